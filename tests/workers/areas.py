"""Keeps areas of anonymous memory, and knows every byte that they must hold.

Every page is a single stamp over and over: a number that no other page or version has, and its
check. So a wrong page tells its origin: another page, an older version, zeros, or garbage. All
accesses to memory go through libc: ctypes releases the GIL, so that threads really are concurrent,
and a thread that waits for a page does not make the others wait.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from array import array
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

PAGE: Final = mmap.PAGESIZE
NONE, READ, BOTH = 0, 1, 3  # PROT_*
MAYMOVE, FIXED, DONTUNMAP = 1, 2, 4  # MREMAP_*
DONTNEED, FREE, HUGEPAGE, NOHUGEPAGE = 4, 8, 14, 15  # MADV_*
_ANONYMOUS, _MAP_FIXED = 0x22, 0x10  # with MAP_PRIVATE
_STAMP: Final = struct.Struct("=QQ")
_PER_PAGE: Final = PAGE // _STAMP.size
_ODD: Final = 0x9E3779B97F4A7C15
_MASK: Final = (1 << 64) - 1
ZEROS: Final = bytes(PAGE)
PAGE_OR_ZEROS, REST_OR_ZEROS = 1, 2
"""MADV_FREE leaves open, until a page is written, all of the page, or all but its first stamp; or
both, when the page is freed again."""

_libc = ctypes.CDLL(None, use_errno=True)


def _function(name: str, result: object, *arguments: object) -> Callable[..., int]:
    found = getattr(_libc, name)
    found.restype, found.argtypes = result, arguments
    return found  # type: ignore[no-any-return]


_p, _n, _i = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_mmap = _function("mmap", _p, _p, _n, _i, _i, _i, ctypes.c_long)
_munmap = _function("munmap", _i, _p, _n)
_mremap = _function("mremap", _p, _p, _n, _n, _i, _p)
_madvise = _function("madvise", _i, _p, _n, _i)
_mprotect = _function("mprotect", _i, _p, _n, _i)
_memcmp = _function("memcmp", _i, _p, _p, _n)
_memcpy = _function("memmove", _p, _p, _p, _n)
_write = _function("write", ctypes.c_long, _i, _p, _n)
_sbrk = ctypes.PyDLL(None, use_errno=True).sbrk  # with the GIL: sbrk is not thread-safe
_sbrk.restype, _sbrk.argtypes = _p, (ctypes.c_long,)
_FAILED: Final = _p(-1).value


class Wrong(Exception):
    """A page differs from its expected content. The message has the page, both contents."""


def _checked(result: int | None) -> int:
    if result is None or result in (-1, _FAILED):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def mapped(pages: int, protection: int = BOTH, at: int = 0) -> int:
    """Map new memory. Returns its address. at: over the memory at this place. Raises OSError."""
    flags = _ANONYMOUS | (_MAP_FIXED if at else 0)
    return _checked(_mmap(at, pages * PAGE, protection, flags, -1, 0))


def unmapped(address: int, pages: int) -> None:
    """Unmap pages. Raises OSError."""
    _checked(_munmap(address, pages * PAGE))


def remapped(address: int, old: int, new: int, flags: int = MAYMOVE, to: int = 0) -> int:
    """Call mremap, in pages. Returns the new address. Raises OSError."""
    return _checked(_mremap(address, old * PAGE, new * PAGE, flags, to))


def heap_grown(pages: int) -> int:
    """Grow the heap by pages that are ours for good. Returns their address."""
    _sbrk(-_sbrk(0) % PAGE)
    return _checked(_sbrk(pages * PAGE))


def advised(address: int, size: int, advice: int) -> None:
    """Call madvise, in bytes. Raises OSError."""
    _checked(_madvise(address, size, advice))


def protected(address: int, pages: int, protection: int) -> None:
    """Call mprotect. Raises OSError."""
    _checked(_mprotect(address, pages * PAGE, protection))


def copied(to: int, source: int, size: int) -> None:
    """Copy bytes within memory."""
    _memcpy(to, source, size)


def stamp(label: int) -> bytes:
    """Returns 16 bytes that identify a version of a page; zeros for 0."""
    return _STAMP.pack(label, label * _ODD & _MASK)


def page_of(head: int, rest: int) -> bytes:
    """Returns a page with a stamp at its beginning and another stamp in the rest."""
    return stamp(head) + stamp(rest) * (_PER_PAGE - 1) if head or rest else ZEROS


def named(found: bytes) -> str:
    """Returns the words for a stamp."""
    label, check = _STAMP.unpack(found)
    if not label and not check:
        return "zeros"
    return f"stamp {label:#x}" if label * _ODD & _MASK == check else f"garbage {found.hex()}"


class Area:
    """Contiguous pages, which belong to a single thread at a time."""

    __slots__ = ("address", "heads", "open", "rests")

    def __init__(self, address: int, labels: Iterable[int]) -> None:
        self.address = address
        self.rests = array("Q", labels)
        self.heads = array("Q", self.rests)
        self.open = bytearray(len(self.rests))

    def __len__(self) -> int:
        return len(self.rests)

    def at(self, page: int) -> int:
        """Returns the address of a page."""
        return self.address + page * PAGE

    def split(self, page: int) -> Area:
        """Keep the pages before `page`, and return the rest as an area of its own."""
        other = Area(self.at(page), ())
        other.rests, self.rests = self.rests[page:], self.rests[:page]
        other.heads, self.heads = self.heads[page:], self.heads[:page]
        other.open, self.open = self.open[page:], self.open[:page]
        return other

    def grown(self, pages: int) -> None:
        """Note that the area has `pages` more pages of zeros."""
        self.rests.extend([0] * pages)
        self.heads.extend([0] * pages)
        self.open.extend(bytes(pages))

    def emptied(self, first: int, count: int) -> None:
        """Note that the pages are zeros now."""
        empty = array("Q", bytes(8 * count))
        self.rests[first : first + count] = empty
        self.heads[first : first + count] = empty
        self.open[first : first + count] = bytes(count)

    def freed(self, first: int, count: int) -> None:
        """Note that the pages are unchanged, or zeros."""
        for page in range(first, first + count):
            self.open[page] |= PAGE_OR_ZEROS

    def write(self, first: int, labels: list[int]) -> None:
        """Write whole pages."""
        data = b"".join(page_of(label, label) for label in labels)
        count = len(labels)
        _memcpy(self.at(first), data, len(data))
        self.rests[first : first + count] = self.heads[first : first + count] = array("Q", labels)
        self.open[first : first + count] = bytes(count)

    def poke(self, page: int, label: int) -> None:
        """Write the beginning of a page."""
        _memcpy(self.at(page), stamp(label), _STAMP.size)
        self.heads[page] = label
        if self.open[page]:
            self.open[page] = REST_OR_ZEROS

    def verify(self, first: int = 0, count: int | None = None) -> None:
        """Compare every byte. Raises Wrong."""
        count = len(self) - first if count is None else count
        for start in range(first, first + count, 64):
            size = min(64, first + count - start)
            if _memcmp(self.at(start), self._expected(start, size), size * PAGE):
                for page in range(start, start + size):
                    self._verify_page(page)

    def verify_by_kernel(self, page: int, pipe: tuple[int, int]) -> None:
        """Verify a page that the kernel reads: the kernel waits for the page. Raises Wrong."""
        size = _checked(_write(pipe[1], self.at(page), PAGE))
        found = os.read(pipe[0], size)
        if found not in self._allowed(page):
            raise Wrong(self._told(page, found))

    def _expected(self, first: int, count: int) -> bytes:
        pairs = zip(self.heads[first : first + count], self.rests[first : first + count])  # noqa: B905
        return b"".join([page_of(head, rest) for head, rest in pairs])

    def _allowed(self, page: int) -> list[bytes]:
        head, rest, is_open = self.heads[page], self.rests[page], self.open[page]
        allowed = [page_of(head, rest)]
        if is_open & PAGE_OR_ZEROS:
            allowed.append(ZEROS)
        if is_open & REST_OR_ZEROS:
            allowed.append(page_of(head, 0))
        return allowed

    def _verify_page(self, page: int) -> None:
        found = ctypes.string_at(self.at(page), PAGE)
        if found not in self._allowed(page):
            raise Wrong(self._told(page, found))

    def _told(self, page: int, found: bytes) -> str:
        head, rest, size = self.heads[page], self.rests[page], _STAMP.size
        parts = {named(found[at : at + size]): None for at in range(0, PAGE, size)}
        again = ctypes.string_at(self.at(page), PAGE)
        later = "" if again == found else f", a moment later {named(again[-size:])}"
        expected = " and ".join(dict.fromkeys((named(stamp(head)), named(stamp(rest)))))
        return (
            f"page {page} of the area at {self.address:#x} ({self.at(page):#x}, open "
            f"{self.open[page]}): expected {expected}, found {' and '.join(list(parts)[:4])}{later}"
        )
