"""Compares the content of files with the digests of their chunks. Lean."""

from __future__ import annotations

import errno
import os

from shim.integrity import chunks, tree
from shim.integrity.tree import Mismatch, Replaced
from shim.kernel import filesystem
from shim.kernel.beneath import open_beneath

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from shim.integrity.tree import Entry, Line
    from shim.integrity.work import Work

_JOB_CHUNKS = 16
"""The number of chunks that a thread takes at once: 64 MiB."""
UNREADABLE = (errno.EIO, errno.EUCLEAN, errno.EBADMSG)
"""The errors of a bad disk, a bad file system, or the kernel's own check by fs-verity."""
_O_FILE = os.O_RDONLY | os.O_NONBLOCK


def read(line: Line, entry: Entry) -> bytes:
    """Returns the checked content of a small file. Raises Mismatch, OSError."""
    with entry.open() as file:
        content = os.pread(file.fileno(), entry.status.st_size + 1, 0)
    _compare(entry.below, 0, line.digests, chunks.digests_of(content))
    return content


def check_here(line: Line, entry: Entry, work: Work) -> None:
    """Hash a file of a single chunk, and compare. Raises Mismatch, OSError."""
    size = entry.status.st_size
    with entry.open() as file:
        found = _hashed(file.fileno(), 0, size, entry.below, work)
    _compare(entry.below, 0, line.digests, [found])


def check_later(line: Line, entry: Entry, snapshot_dirfd: int, work: Work) -> None:
    """Leave a file of many chunks to `work`, in pieces that several threads can take."""
    if len(line.digests) != chunks.count(entry.status.st_size):
        raise Mismatch(tree.printable(entry.below), "a digest for each chunk", "another number")
    for first in range(0, len(line.digests), _JOB_CHUNKS):
        work.add(_Piece(snapshot_dirfd, line, entry, first, work))


def kernel_vouches(line: Line, entry: Entry) -> bool:
    """Returns whether fs-verity has the file's content under the listed digest.

    If so, the kernel compares every page with that digest when it reads the page. Raises Mismatch,
    OSError.
    """
    if not line.verity:
        return False
    with entry.open() as file:
        measured = filesystem.measure_verity(file.fileno())
    if measured and measured != line.verity:
        where = tree.printable(entry.below)
        raise Mismatch(where, f"fs-verity {line.verity[:16]}", measured[:16])
    return bool(measured)  # false for a snapshot from another node: its chunks count


class _Piece:
    """Checks up to _JOB_CHUNKS chunks of a file, as a job."""

    __slots__ = ("_digests", "_dirfd", "_first", "_identity", "_path", "_size", "_work")

    def __init__(
        self, snapshot_dirfd: int, line: Line, entry: Entry, first: int, work: Work
    ) -> None:
        self._dirfd, self._path, self._first, self._work = snapshot_dirfd, entry.below, first, work
        self._identity, self._size = tree.identity(entry.status), entry.status.st_size
        self._digests = line.digests[first : first + _JOB_CHUNKS]

    def __call__(self) -> None:
        with open_beneath(self._dirfd, tree.raw(self._path), _O_FILE) as file:
            found = self._found(file.fileno())
            _compare(self._path, self._first, self._digests, found)
            if tree.identity(os.fstat(file.fileno())) != self._identity:
                raise Replaced(tree.printable(self._path))

    def _found(self, fd: int) -> Iterator[str]:
        for index in range(self._first, self._first + len(self._digests)):
            yield _hashed(fd, index, self._size, self._path, self._work)


def _hashed(fd: int, index: int, size: int, path: str, work: Work) -> str:
    try:
        return chunks.digest(fd, index, size, work.tick)
    except chunks.Short:
        raise Mismatch(tree.printable(path), f"{size} bytes", "fewer while it was read") from None
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        raise Mismatch(_place(path, index), "readable content", str(error.strerror)) from error


def _compare(path: str, first: int, listed: list[str], found: Iterator[str] | list[str]) -> None:
    for index, (expected, actual) in enumerate(zip(listed, found, strict=True), first):
        if expected != actual:
            raise Mismatch(_place(path, index), f"SHA-256 {expected!s:.16}", actual[:16])


def _place(path: str, index: int) -> str:
    return f"{tree.printable(path)}, chunk {index} of {chunks.CHUNK_BYTES >> 20} MiB"
