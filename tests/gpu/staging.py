"""Reading, emptying and filling the memory that the driver keeps a checkpoint in, from outside."""

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from tests.gpu.procfs import Area

BLOCK: Final = 16 << 20
PUNCH_KEEPING_SIZE: Final = 3
"""FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE"""
_libc = ctypes.CDLL(None, use_errno=True)


class IoVec(ctypes.Structure):
    """struct iovec."""


IoVec._fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of one area. `offset` is where it is in a copy of all areas."""

    area: Area
    start: int
    size: int
    offset: int

    @property
    def file_offset(self) -> int:
        return self.start - self.area.start + self.area.offset


def pieces(areas: list[Area], block: int = BLOCK) -> list[Piece]:
    """All areas in blocks."""
    found, offset = [], 0
    for area in areas:
        for start in range(area.start, area.end, block):
            size = min(block, area.end - start)
            found.append(Piece(area, start, size, offset))
            offset += size
    return found


Move = Callable[[Piece, memoryview], None]


@contextmanager
def by_mem(pid: int, areas: list[Area], *, write: bool = False) -> Iterator[Move]:
    """/proc/PID/mem, pread and pwrite."""
    del areas
    fd = os.open(f"/proc/{pid}/mem", os.O_RDWR if write else os.O_RDONLY)
    try:
        yield lambda piece, view: _whole(write, fd, view, piece.start)
    finally:
        os.close(fd)


@contextmanager
def by_map_files(pid: int, areas: list[Area], *, write: bool = False) -> Iterator[Move]:
    """/proc/PID/map_files/RANGE, pread and pwrite of the file behind the area."""
    with opened(pid, areas, write=write) as fds:
        yield lambda piece, view: _whole(write, fds[piece.area.start], view, piece.file_offset)


@contextmanager
def by_mapping(pid: int, areas: list[Area], *, write: bool = False) -> Iterator[Move]:
    """The file behind the area mapped into this process."""
    with opened(pid, areas, write=True) as fds:
        maps = {
            area.start: mmap.mmap(fds[area.start], area.size, offset=area.offset) for area in areas
        }

        def move(piece: Piece, view: memoryview) -> None:
            there = memoryview(maps[piece.area.start])
            there = there[piece.start - piece.area.start :][: piece.size]
            # memmove, as ctypes lets other threads run during it.
            ends = [ctypes.addressof(ctypes.c_char.from_buffer(each)) for each in (view, there)]
            ctypes.memmove(ends[write], ends[not write], piece.size)

        yield move


@contextmanager
def by_vm_calls(pid: int, areas: list[Area], *, write: bool = False) -> Iterator[Move]:
    """process_vm_readv and process_vm_writev."""
    del areas
    call = _libc.process_vm_writev if write else _libc.process_vm_readv
    call.restype = ctypes.c_ssize_t

    def move(piece: Piece, view: memoryview) -> None:
        here = IoVec(ctypes.addressof(ctypes.c_char.from_buffer(view)), piece.size)
        there = IoVec(piece.start, piece.size)
        one, none = ctypes.c_ulong(1), ctypes.c_ulong(0)
        moved = call(pid, ctypes.byref(here), one, ctypes.byref(there), one, none)
        if moved != piece.size:
            code = ctypes.get_errno()
            raise OSError(code, f"{moved} of {piece.size}: {os.strerror(code)}")

    yield move


WAYS: Final = {
    "process_vm": by_vm_calls,
    "mem": by_mem,
    "map_files": by_map_files,
    "mapping": by_mapping,
}


def _whole(write: bool, fd: int, view: memoryview, at: int) -> None:
    moved = os.pwritev(fd, [view], at) if write else os.preadv(fd, [view], at)
    if moved != len(view):
        raise OSError(f"{moved} of {len(view)} at {at:x}")


@contextmanager
def opened(pid: int, areas: list[Area], *, write: bool) -> Iterator[dict[int, int]]:
    """The files behind the areas, by start address."""
    fds: dict[int, int] = {}
    try:
        for area in areas:
            flags = os.O_RDWR if write else os.O_RDONLY
            fds[area.start] = os.open(f"/proc/{pid}/map_files/{area.name}", flags)
        yield fds
    finally:
        for fd in fds.values():
            os.close(fd)


class Copy:
    """Room for the content of all areas, resident before anything is timed."""

    def __init__(self, size: int) -> None:
        self.room = mmap.mmap(-1, max(size, mmap.PAGESIZE), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self.room)
        for start in range(0, size, BLOCK):
            end = min(size, start + BLOCK)
            self.view[start:end] = bytes(end - start)


def moved(
    pid: int, areas: list[Area], copy: Copy, way: str, threads: int, *, write: bool = False
) -> float:
    """Copy all areas out, or with `write` in. Returns seconds. Raises OSError where refused."""
    with WAYS[way](pid, areas, write=write) as move, ThreadPoolExecutor(threads) as pool:
        started = time.monotonic()
        futures = [
            pool.submit(move, piece, copy.view[piece.offset : piece.offset + piece.size])
            for piece in pieces(areas)
        ]
        for future in futures:
            future.result()
        return time.monotonic() - started


def punch(pid: int, areas: list[Area], threads: int = 8) -> float:
    """Give the memory of shared areas back; they read as zeros. Returns seconds."""
    with opened(pid, areas, write=True) as fds, ThreadPoolExecutor(threads) as pool:
        started = time.monotonic()
        for future in [pool.submit(_punch, fds[area.start], area) for area in areas]:
            future.result()
        return time.monotonic() - started


def _punch(fd: int, area: Area) -> None:
    sizes = ctypes.c_long(area.offset), ctypes.c_long(area.size)
    if _libc.fallocate(fd, PUNCH_KEEPING_SIZE, *sizes):
        code = ctypes.get_errno()
        raise OSError(code, f"fallocate: {os.strerror(code)}")
