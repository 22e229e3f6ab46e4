"""Reads CRIU's images of memory: a process's pages, and its areas that may be filled lazily.

T2: imports protobuf.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from google.protobuf.message import DecodeError, Message

from protos import criu_pb2
from shim.criu.images import DamagedImage, entries, first, parsed

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

PAGE: Final = 4096
PARENT: Final = criu_pb2.PagemapEntry.PARENT
LAZY: Final = criu_pb2.PagemapEntry.LAZY
PRESENT: Final = criu_pb2.PagemapEntry.PRESENT
MAP_HUGETLB: Final = 0x40000

_LENGTH = struct.Struct("<I")
_MAGIC_BYTES = 8
_MAP_PRIVATE, _MAP_ANONYMOUS, _MAP_LOCKED = 0x02, 0x20, 0x2000
_MADV_HUGEPAGE = 14
_VMA_VSYSCALL, _VMA_VDSO, _VMA_VVAR = 1 << 2, 1 << 3, 1 << 12


@dataclass(frozen=True, slots=True)
class Pages:
    """Contiguous pages. start, end: addresses. flags: LAZY, PRESENT."""

    start: int
    end: int
    flags: int

    @property
    def size(self) -> int:
        """Returns the size in bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Pagemap:
    """A pagemap image. The content of PRESENT pages is in pages-{pages_id}.img, in this order."""

    pages_id: int
    pages: tuple[Pages, ...]


def read(path: Path) -> Pagemap:
    """Returns the pagemap at `path`. Raises DamagedImage, OSError."""
    head, *rest = entries(path)
    try:
        found = criu_pb2.PagemapHead.FromString(head)
        return Pagemap(found.pages_id, tuple(map(_pages, rest)))
    except DecodeError as error:
        raise DamagedImage(f"{path.name}: {error}") from error


def pages_id(path: Path) -> int:
    """Returns the pages_id of an image; reads no entries. Raises DamagedImage, OSError."""
    return parsed(criu_pb2.PagemapHead, first(path), path).pages_id


def _pages(raw: bytes) -> Pages:
    entry = criu_pb2.PagemapEntry.FromString(raw)
    if entry.in_parent or entry.flags & PARENT:
        raise DamagedImage("a pagemap with pages in another snapshot")
    count = entry.nr_pages or entry.compat_nr_pages
    # An entry without flags is from a CRIU that had no flags yet.
    flags = entry.flags if entry.HasField("flags") else PRESENT
    return Pages(entry.vaddr, entry.vaddr + count * PAGE, flags)


def write(path: Path, pagemap: Pagemap) -> None:
    """Replace the image at `path`, whose magic stays. Raises OSError."""
    head = criu_pb2.PagemapHead(pages_id=pagemap.pages_id)
    replace(path, [head, *map(_entry, pagemap.pages)])


def replace(path: Path, messages: Iterable[Message]) -> None:
    """Write other entries into the image at `path`, whose magic stays. Raises OSError."""
    with path.open("rb") as file:
        out = bytearray(file.read(_MAGIC_BYTES))
    for message in messages:
        raw = message.SerializeToString()
        out += _LENGTH.pack(len(raw)) + raw
    path.write_bytes(out)


def _entry(pages: Pages) -> criu_pb2.PagemapEntry:
    count = pages.size // PAGE
    return criu_pb2.PagemapEntry(
        vaddr=pages.start, compat_nr_pages=count & 0xFFFFFFFF, nr_pages=count, flags=pages.flags
    )


def lazy_areas(path: Path) -> list[tuple[int, int]]:
    """Returns the areas in mm-PID.img that CRIU registers with a page server.

    Raises DamagedImage, OSError. Source: CRIU, criu/include/vma.h, vma_entry_can_be_lazy.
    """
    return [(vma.start, vma.end) for vma in lazy(path)]


def huge_areas(path: Path) -> list[tuple[int, int]]:
    """Returns the lazy areas in which the process wants huge pages. Raises as `lazy_areas`."""
    return [(vma.start, vma.end) for vma in lazy(path) if vma.madv >> _MADV_HUGEPAGE & 1]


def lazy(path: Path) -> list[criu_pb2.Vma]:
    """Returns the entries of the lazy areas. Raises as `lazy_areas`."""
    return [vma for vma in _vmas(path) if _is_lazy(vma)]


def _vmas(path: Path) -> Sequence[criu_pb2.Vma]:
    return read_mm(path).vmas


def read_mm(path: Path) -> criu_pb2.Mm:
    """Returns the content of mm-PID.img. Raises DamagedImage, OSError."""
    (raw,) = entries(path)
    return parsed(criu_pb2.Mm, raw, path)


def _is_lazy(vma: criu_pb2.Vma) -> bool:
    return (
        vma.flags & (_MAP_ANONYMOUS | _MAP_PRIVATE) == _MAP_ANONYMOUS | _MAP_PRIVATE
        and not vma.flags & (_MAP_LOCKED | MAP_HUGETLB)
        and not vma.status & (_VMA_VDSO | _VMA_VVAR | _VMA_VSYSCALL)
    )


def clipped(pages: Iterable[Pages], areas: Iterable[tuple[int, int]]) -> list[Pages]:
    """Returns `pages`, cut where areas end: a range that is filled at once lies in one area."""
    borders = sorted({end for _, end in areas})
    found: list[Pages] = []
    at = 0
    for each in pages:
        start = each.start
        while at < len(borders) and borders[at] <= start:
            at += 1
        following = at
        while following < len(borders) and borders[following] < each.end:
            found.append(Pages(start, borders[following], each.flags))
            start = borders[following]
            following += 1
        found.append(Pages(start, each.end, each.flags))
    return found
