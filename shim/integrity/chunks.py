"""The digests of a file's content: one SHA-256 for every 4 MiB of it. Lean.

By chunk, so that several threads can check one file, and a chunk can be checked without the rest
of its file. The chunks' digests are in the listing of the file's part (see `shim.integrity.tree`).
Reading and hashing leave the GIL free.
"""

from __future__ import annotations

import errno
import os

from shim.kernel.sha256 import hexdigest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

CHUNK_BYTES = 4 << 20
_BLOCK = 256 << 10
"""Read and hashed at once: stays in the processor's cache."""
_SMALL = 64 << 10
"""Read at once, and no reason to load OpenSSL."""
_ZEROS = "bb9f8df61474d25e71fa00722318cd387396ca1736605e1248821cc0de3d3af8"
"""SHA-256 of a chunk of zeros. Written out: computing it takes longer than all of this import."""


class Short(Exception):
    """The file ended before its size."""


def count(size: int) -> int:
    """How many chunks a file of `size` bytes has: an empty one has one, which is empty."""
    return max(1, -(-size // CHUNK_BYTES))


def _nothing() -> None:
    pass


def digest(fd: int, index: int, size: int, tick: Callable[[], None] = _nothing) -> str:
    """The SHA-256 in hexadecimal of chunk `index` of a file of `size` bytes.

    tick: called now and then; what it raises ends the work. Raises OSError, Short.
    """
    start = index * CHUNK_BYTES
    end = min(start + CHUNK_BYTES, size)
    if end - start == CHUNK_BYTES and _is_hole(fd, start, end):
        tick()
        return _ZEROS
    if end - start <= _SMALL and len(content := os.pread(fd, end - start, start)) == end - start:
        return hexdigest(content)
    import hashlib  # late: see shim.kernel.sha256

    found = hashlib.sha256()
    block = memoryview(bytearray(min(_BLOCK, end - start)))
    while start < end:
        tick()
        got = os.preadv(fd, [block[: end - start]], start)
        if not got:
            raise Short
        found.update(block[:got])
        start += got
    return found.hexdigest()


def digests(fd: int, size: int) -> list[str]:
    """The digests of all chunks. Raises OSError, Short."""
    return [digest(fd, index, size) for index in range(count(size))]


def digests_of(content: bytes) -> list[str]:
    """The digests of all chunks of what was read already."""
    view = memoryview(content)
    return [
        hexdigest(view[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])
        for index in range(count(len(content)))
    ]


def _is_hole(fd: int, start: int, end: int) -> bool:
    """A whole chunk without data need not be read. Holes read as zeros, so it is no more trust."""
    try:
        return os.lseek(fd, start, os.SEEK_DATA) >= end
    except OSError as error:
        if error.errno == errno.ENXIO:  # there is no data up to the end
            return True
        if error.errno == errno.EINVAL:
            return False
        raise
