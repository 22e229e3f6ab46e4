"""Lists and reads the pages of other processes' memory.

Reading and comparing leave the interpreter's lock free. Sources: proc_pid_maps(5),
proc_pid_pagemap(5), process_vm_readv(2), madvise(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import re
from array import array
from typing import TYPE_CHECKING, Final

from shim.kernel import procfs
from shim.kernel.libc import populate_read

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    Range = tuple[int, int]
    """First address, and the address behind the last. Whole pages."""

PAGE: Final = mmap.PAGESIZE
MAX_RANGES: Final = 1024
"""Limit of a call of `Reader.read`. Source: UIO_MAXIOV."""
MAX_BYTES: Final = 4 << 20
"""Limit of a call of `is_zero`."""

_libc = ctypes.CDLL(None, use_errno=True)
_read = _libc.process_vm_readv
_read.argtypes = [
    ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong
]  # fmt: skip
_read.restype = ctypes.c_ssize_t
_memcmp = _libc.memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

_ENTRY_BYTES = 8
_MAP_BYTES = 512 << 10
_MAX_AREA = 1 << 40
"""A larger area was only reserved: looking through it would take seconds. The capture copies its
pages while the process is frozen."""
_THERE = bytes(int(byte & 0xC0 != 0) for byte in range(256))
"""By the highest byte of an entry: whether the page is in memory or swapped out."""
_WRITTEN = bytes(int(byte & 0x80 != 0) for byte in range(256))
"""By the second highest byte: the soft-dirty bit."""
_SHARED = bytes(int(byte & 0x40 != 0 or byte & 0x81 == 0x80) for byte in range(256))
"""By the highest byte: mapped more than once (present without bit 56), or swapped out."""
_SPAN = 4
"""One look serves several ranges if they lie within a few times their size."""
_YES, _NO = b"\1", b"\0"
_CLEAR_WRITTEN = b"4"
_RUN = re.compile(b"\x01+")
_OWN = (b"r--p", b"rw-p")
_NAMES = (b"", b"[heap]", b"[stack]")


class Buffer:
    """Memory whose address the kernel can take. Zeros at first."""

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._held = ctypes.c_char.from_buffer(self._map)
        self.view, self.address = memoryview(self._map), ctypes.addressof(self._held)


_zeros = Buffer(MAX_BYTES)


class Mapped:
    """A file in memory, for comparisons. Cached pages of the file are mapped from the start."""

    def __init__(self, fd: int, size: int) -> None:
        self._map = mmap.mmap(fd, size) if size else mmap.mmap(-1, PAGE)
        self._held: ctypes.c_char | None = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(self._held)
        with contextlib.suppress(OSError):  # Linux before 5.14: a comparison maps the pages
            populate_read(self.address, size)

    def close(self) -> None:
        """Unmap the file. Nobody may use the address any more."""
        self._held = None
        self._map.close()


def own_areas(pid: int) -> list[Range]:
    """Returns private anonymous mappings, readable and not executable. Raises OSError."""
    found = []
    for area in procfs.areas(pid):
        if area.rights in _OWN and area.device == procfs.NO_DEVICE:
            name = area.name
            if name in _NAMES or name.startswith(b"[anon:"):
                found.append(area.range)
    return found


def pages(pid: int, areas: Iterable[Range]) -> Iterator[Range]:
    """Yields the ranges of the areas that are in memory, or swapped out. Raises OSError."""
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for start, end in areas:
            if end - start <= _MAX_AREA:
                yield from _pages(fd, start, end)
    finally:
        os.close(fd)


def _pages(fd: int, start: int, end: int) -> Iterator[Range]:
    began, behind = start, start  # of a run that may continue in the next piece
    for first in range(start, end, _MAP_BYTES // _ENTRY_BYTES * PAGE):
        wanted = min(_MAP_BYTES, (end - first) // PAGE * _ENTRY_BYTES)
        entries = os.pread(fd, wanted, first // PAGE * _ENTRY_BYTES)
        for run in _RUN.finditer(entries[_ENTRY_BYTES - 1 :: _ENTRY_BYTES].translate(_THERE)):
            if first + run.start() * PAGE != behind:
                if began < behind:
                    yield began, behind
                began = first + run.start() * PAGE
            behind = first + run.end() * PAGE
    if began < behind:
        yield began, behind


class WriteWatch:
    """Watches which pages a process writes from now on. Only if `can_watch`.

    Methods raise OSError. Sources: Documentation/admin-guide/mm/soft-dirty.rst.
    """

    def __init__(self, pid: int) -> None:
        self._fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            with open(f"/proc/{pid}/clear_refs", "wb", buffering=0) as file:
                file.write(_CLEAR_WRITTEN)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop watching."""
        os.close(self._fd)

    def is_as_it_was(self, ranges: Iterable[Range]) -> bool:
        """Whether all pages are still there and none was written. False when that is not known.

        A page may go and, because the process only reads it since, come back as a page of zeros.
        Such a page counts as there: it has no content, and no list of CRIU's has it.
        """
        for start, end in ranges:
            size = (end - start) // PAGE * _ENTRY_BYTES
            entries = os.pread(self._fd, size, start // PAGE * _ENTRY_BYTES)
            if len(entries) < size:
                return False  # the process has executed another program
            if _NO in entries[_ENTRY_BYTES - 1 :: _ENTRY_BYTES].translate(_THERE):
                return False
            if _YES in entries[_ENTRY_BYTES - 2 :: _ENTRY_BYTES].translate(_WRITTEN):
                return False
        return True


@functools.cache
def can_watch() -> bool:
    """Whether this kernel has soft-dirty bits (CONFIG_MEM_SOFT_DIRTY): tried on our own memory."""
    buffer = Buffer(PAGE)
    buffer.view[0] = 1
    ranges = [(buffer.address, buffer.address + PAGE)]
    try:
        watch = WriteWatch(os.getpid())
    except OSError:
        return False
    try:
        before = watch.is_as_it_was(ranges)
        buffer.view[0] = 2
        return before and not watch.is_as_it_was(ranges)
    finally:
        watch.close()


def vectors(ranges: Iterable[Range]) -> array[int]:
    """Returns ranges in the form that `Reader.read` takes."""
    return array("Q", [word for start, end in ranges for word in (start, end - start)])


class Reader:
    """Reads the memory of a process, and leaves it as it is.

    process_vm_readv is the fast way, but pins pages: of each page that is mapped more than once
    (since a fork, or by KSM) the kernel first makes a copy for the process that we read
    (gup_must_unshare in mm/gup.c), on the account of its container. So we read a range with such a
    page through /proc/PID/mem, which does not pin. The kernel still copies a page that becomes
    shared between the look and the reading: a range's worth at most for each fork.

    Several threads may call the methods at once. Raises OSError when the process is gone.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._pages_fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._memory_fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            os.close(self._pages_fd)
            raise

    def close(self) -> None:
        """Close the descriptors."""
        os.close(self._pages_fd)
        os.close(self._memory_fd)

    def read(self, wanted: array[int], size: int, buffer: Buffer) -> int:
        """Read ranges, one behind the other. Returns the number of bytes that were there.

        Ends at the first range that cannot be read, perhaps within it. wanted: from `vectors`.
        size: of all ranges. Raises OSError when the process is gone.
        """
        if self._is_shared(wanted, size):
            return self._read_unpinned(wanted, buffer)
        return read_pinned(self._pid, wanted, size, buffer.address)

    def _is_shared(self, wanted: array[int], size: int) -> bool:
        """Whether a page may be mapped more than once. A swapped page may: nothing denies that."""
        first, end = wanted[0], wanted[-2] + wanted[-1]
        if 0 < end - first <= _SPAN * size:  # one look at all pages between is cheaper than many
            return self._has_shared(first, end - first)
        words = iter(wanted)
        pairs = zip(words, words, strict=True)
        return any(self._has_shared(start, length) for start, length in pairs)

    def _has_shared(self, start: int, length: int) -> bool:
        size = length // PAGE * _ENTRY_BYTES
        entries = os.pread(self._pages_fd, size, start // PAGE * _ENTRY_BYTES)
        if len(entries) < size:
            return True  # the process has executed another program, of which nothing is known
        return _YES in entries[_ENTRY_BYTES - 1 :: _ENTRY_BYTES].translate(_SHARED)

    def _read_unpinned(self, wanted: array[int], buffer: Buffer) -> int:
        words, done = iter(wanted), 0
        for start, length in zip(words, words, strict=True):
            end = done + length
            while done < end:
                try:
                    got = os.preadv(
                        self._memory_fd, [buffer.view[done:end]], start + length - (end - done)
                    )
                except OSError as error:
                    if error.errno != errno.EIO:
                        raise
                    return done
                if not got:
                    return done
                done += got
        return done


def read_pinned(pid: int, wanted: array[int], size: int, into: int) -> int:
    """Read as `Reader.read`, into our memory at an address. Gives the process its own pages."""
    local = array("Q", [into, size])
    got: int = _read(
        pid, local.buffer_info()[0], 1, wanted.buffer_info()[0], len(wanted) // 2, 0
    )  # fmt: skip
    if got >= 0:
        return got
    if ctypes.get_errno() == errno.EFAULT:
        return 0
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), f"process {pid}")


def read_forced(pid: int, start: int, view: memoryview) -> int:
    """Read even pages that the process may not. Slower. Returns the bytes read. Raises OSError."""
    done = 0
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
        while done < len(view):
            file.seek(start + done)
            try:
                got = file.readinto(view[done:])
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                break
            if not got:
                break
            done += got
    return done


def is_equal(one: int, other: int, size: int) -> bool:
    """Whether the memory at two of our addresses is the same."""
    return not _memcmp(one, other, size)


def is_zero(address: int, size: int) -> bool:
    """Whether up to MAX_BYTES of our memory are zeros."""
    return not _memcmp(address, _zeros.address, size)


def zero_pages(buffer: Buffer, size: int) -> list[Range]:
    """Returns the pages at the beginning of the buffer that are all zeros: offsets."""
    found: list[Range] = []
    words = buffer.view[:size].cast("Q")
    for number, word in enumerate(words[:: PAGE // 8].tolist()):
        at = number * PAGE
        if word or not is_zero(buffer.address + at, PAGE):
            continue
        if found and found[-1][1] == at:
            found[-1] = (found[-1][0], at + PAGE)
        else:
            found.append((at, at + PAGE))
    return found
