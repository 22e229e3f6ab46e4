"""Files of a tmpfs, filled by several threads. Lean.

`write` locks a file, so that a second thread gains nothing, and a page fault zeroes a page before
it is written to. UFFDIO_COPY into a mapping of our own does neither. The kernel copies from the
page cache. What cannot be done so is copied as other files are.
"""

from __future__ import annotations

import mmap
import os

from shim.integrity.work import Work
from shim.kernel import userfault
from shim.kernel.libc import mapped_shared, populate_read
from shim.rootfs.inode import Copier, data_ranges

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_MUCH_BYTES = 8 << 20
"""From here on threads are worth their start."""
_PIECE_BYTES = 4 << 20
_PAGE = mmap.PAGESIZE


class ParallelCopier(Copier):
    """Copies to a tmpfs; big files by all processors."""

    __slots__ = ("_can",)

    def __init__(self) -> None:
        super().__init__()
        self._can = True

    def copy_data(self, source_fd: int, target_fd: int, status: os.stat_result) -> None:
        """As Copier's."""
        if self._can and status.st_size >= _MUCH_BYTES:
            try:
                os.truncate(target_fd, status.st_size)
                _fill(source_fd, target_fd, status.st_size)
            except (OSError, *userfault.REFUSALS):  # no tmpfs, no userfaultfd, or no room
                self._can = False
                os.truncate(target_fd, 0)
            else:
                self.bytes += status.st_size
                return
        super().copy_data(source_fd, target_fd, status)


def _fill(source_fd: int, target_fd: int, size: int) -> None:
    whole = -(-size // _PAGE) * _PAGE
    work = Work(float("inf"))
    with (
        mapped_shared(source_fd, whole, writable=False) as source,
        mapped_shared(target_fd, whole) as target,
        userfault.registered(target, whole) as fault_fd,
    ):
        for start, end in _pieces(data_ranges(source_fd, size)):
            work.add(_job(work, fault_fd, source + start, target + start, end - start))
        try:
            work.start()
            work.finish()
        finally:
            work.stop()  # before what it uses goes


def _job(work: Work, fd: int, source: int, target: int, size: int) -> Callable[[], None]:
    def copy() -> None:
        work.tick()
        populate_read(source, size)  # a copy that meets a missing page starts again
        userfault.copy_all(fd, target, source, size)

    return copy


def _pieces(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Whole pages, each once: blocks of a file system may be smaller."""
    behind = 0
    for first, last in ranges:
        start = max(behind, first // _PAGE * _PAGE)
        behind = max(start, -(-last // _PAGE) * _PAGE)
        for at in range(start, behind, _PIECE_BYTES):
            yield at, min(at + _PIECE_BYTES, behind)
