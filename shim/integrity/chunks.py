"""Computes the digests of a file's content: a SHA-256 for every 4 MiB. Lean.

With a digest for each chunk, several threads can check a file together, and a reader can check a
chunk without the rest of its file. The listing of the file's part has the chunks' digests (see
`shim.integrity.tree`). Reading and hashing leave the GIL free.
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
"""The bytes to read and hash at once: they stay in the processor's cache."""
_SMALL = 64 << 10
"""Up to this size a single read is enough, and OpenSSL is not worth loading."""
_ZEROS = "bb9f8df61474d25e71fa00722318cd387396ca1736605e1248821cc0de3d3af8"
"""SHA-256 of a chunk of zeros. A constant: computing it takes longer than all of this import."""


class Short(Exception):
    """The file ended before its size."""


def count(size: int) -> int:
    """Returns the number of chunks of a file of `size` bytes: 1, an empty chunk, for 0."""
    return max(1, -(-size // CHUNK_BYTES))


def _nothing() -> None:
    pass


def digest(fd: int, index: int, size: int, tick: Callable[[], None] = _nothing) -> str:
    """Returns the SHA-256 in hexadecimal of chunk `index` of a file of `size` bytes.

    tick: `digest` calls it now and then; an exception from `tick` ends the work. Raises OSError,
    Short.
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
    """Returns the digests of all chunks. Raises OSError, Short."""
    return [digest(fd, index, size) for index in range(count(size))]


def digests_of(content: bytes) -> list[str]:
    """Returns the digests of all chunks of content that is in memory."""
    view = memoryview(content)
    return [
        hexdigest(view[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])
        for index in range(count(len(content)))
    ]


def _is_hole(fd: int, start: int, end: int) -> bool:
    """Returns whether a chunk has no data, so that nobody needs to read it.

    The kernel reads a hole as zeros: trusting the hole is no more trust than reading it.
    """
    try:
        return os.lseek(fd, start, os.SEEK_DATA) >= end
    except OSError as error:
        if error.errno == errno.ENXIO:  # there is no data up to the end
            return True
        if error.errno == errno.EINVAL:
            return False
        raise
