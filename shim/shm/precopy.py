"""Copies big files of a tmpfs while their container runs, and updates them while it is frozen.

Nobody can tell which bytes were written since: writes through a mapping change no time. So several
threads compare all of a file, which takes a third of the time of copying it with a single thread.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Final

from shim.integrity import work
from shim.kernel.fds import OwnedFd
from shim.kernel.filesystem import punch_hole, write_at
from shim.kernel.othermemory import Buffer, is_equal
from shim.rootfs.inode import O_SOURCE, Copier, data_ranges, pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from shim.kernel.stopping import Stop

    Range = tuple[int, int]
    Key = tuple[int, int]

MUCH_BYTES: Final = 8 << 20
"""From this size on, a file is big."""
_MOST_FILES = 64
_O_NAMELESS = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
_MOST_PIECES = 1 << 16
"""The limit for a file. A single thread copies any further pieces: the list would grow."""
_BATCH_BYTES = 512 << 10
"""The bytes to compare at once: both sides stay in the processor's cache."""

_of_thread = threading.local()


class PrecopyingCopier(Copier):
    """Owns the copies of big files until it is closed. stop: ends the work."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(tick=stop.check)
        self._copies: dict[Key, OwnedFd] = {}
        """Files without a name, until they get their names."""

    def close(self) -> None:
        """Keep the copies that have a name."""
        for each in self._copies.values():
            each.close()
        self._copies = {}

    def precopy(self, source_dirfd: int, name: str, target_dirfd: int) -> None:
        """Copy a file that may change into a file without a name in the target's file system.

        Skips small files. Raises OSError.
        """
        with OwnedFd(os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=source_dirfd)) as path:
            status = os.fstat(path.fileno())
            key = (status.st_dev, status.st_ino)
            is_big = stat.S_ISREG(status.st_mode) and status.st_size >= MUCH_BYTES
            if not is_big or key in self._copies or len(self._copies) >= _MOST_FILES:
                return
            with OwnedFd(os.open(f"/proc/self/fd/{path.fileno()}", O_SOURCE)) as source:
                copy = OwnedFd(os.open(".", _O_NAMELESS, 0o600, dir_fd=target_dirfd))
                self._copies[key] = copy
                self._renew(source.fileno(), copy.fileno(), status)

    def new_file(self, status: os.stat_result, name: str, target_dirfd: int) -> int:
        """Returns a file as Copier's does: an existing copy gets the name."""
        copy = self._copies.get((status.st_dev, status.st_ino))
        if copy is None:
            return super().new_file(status, name, target_dirfd)
        link = f"/proc/self/fd/{copy.fileno()}"
        os.link(link, name, dst_dir_fd=target_dirfd, follow_symlinks=True)
        return os.dup(copy.fileno())

    def copy_data(self, source_fd: int, target_fd: int, status: os.stat_result) -> None:
        """Copy as Copier does; a big file by several threads."""
        is_copied = (status.st_dev, status.st_ino) in self._copies
        if not is_copied and status.st_size < MUCH_BYTES:
            super().copy_data(source_fd, target_fd, status)
            return
        self.bytes += status.st_size
        self._renew(source_fd, target_fd, status)

    def _renew(self, source_fd: int, target_fd: int, status: os.stat_result) -> None:
        _Renewal(source_fd, target_fd, status.st_size, self.tick).run()


class _Renewal:
    """Gives a file the content and the holes of another; compares content before writing."""

    def __init__(self, source_fd: int, target_fd: int, size: int, tick: Callable[[], None]) -> None:
        self._source_fd, self._target_fd, self._size = source_fd, target_fd, size
        self._tick = tick
        self._is_new = not os.fstat(target_fd).st_blocks

    def run(self) -> None:
        """Bring the target up to date. Raises OSError."""
        os.truncate(self._target_fd, self._size)
        # A single pass: finding the next hole takes time in proportion to the data before the hole.
        left = pieces(self._holes_left(data_ranges(self._source_fd, self._size)))
        some = list(islice(left, _MOST_PIECES))
        work.run(partial(self._renew, *piece) for piece in some)
        for piece in left:
            self._renew(*piece)

    def _holes_left(self, ranges: Iterable[Range]) -> Iterator[Range]:
        """Yields the ranges, and empties the target between them."""
        at = 0
        for start, end in ranges:
            self._empty(at, start)
            yield start, end
            at = end
        self._empty(at, self._size)

    def _empty(self, start: int, end: int) -> None:
        if start < end and not self._is_new and _has_data(self._target_fd, start, end):
            punch_hole(self._target_fd, start, end - start)

    def _renew(self, start: int, end: int) -> None:
        self._tick()
        wanted, there = _buffers()
        for at in range(start, end, _BATCH_BYTES):
            size = min(_BATCH_BYTES, end - at)
            got = os.preadv(self._source_fd, [wanted.view[:size]], at)
            had = 0 if self._is_new else os.preadv(self._target_fd, [there.view[:got]], at)
            if had < got or not is_equal(wanted.address, there.address, got):
                write_at(self._target_fd, wanted.view[:got], at)
            if got < size:
                return  # the source became shorter


def _has_data(fd: int, start: int, end: int) -> bool:
    try:
        return os.lseek(fd, start, os.SEEK_DATA) < end
    except OSError as error:
        if error.errno != errno.ENXIO:  # ENXIO: only a hole follows
            raise
        return False


def _buffers() -> tuple[Buffer, Buffer]:
    """Returns this thread's buffers."""
    if not hasattr(_of_thread, "buffers"):
        _of_thread.buffers = Buffer(_BATCH_BYTES), Buffer(_BATCH_BYTES)
    found: tuple[Buffer, Buffer] = _of_thread.buffers
    return found
