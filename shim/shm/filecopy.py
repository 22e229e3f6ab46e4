"""Fills files of a tmpfs by several threads. Lean.

`write` locks a file, so that a second thread gains nothing, and its page fault zeroes a page before
the write. So this module fills a mapping of its own: with whole huge pages where there is content
for them, and with UFFDIO_COPY elsewhere. The kernel copies from the page cache. Files for which
this fails are copied like other files.
"""

from __future__ import annotations

import mmap
import os
from functools import partial
from itertools import islice

from shim.integrity import work
from shim.kernel import userfault
from shim.kernel.hugepages import HUGE_BYTES, HugePages, blocks
from shim.kernel.libc import copy_memory, mapped_shared, populate_read
from shim.rootfs.inode import Copier, data_ranges, pieces

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    Range = tuple[int, int]

_MUCH_BYTES = 8 << 20
"""From this size on, threads are worth their start."""
_MOST_RANGES = 1 << 16
"""The limit for a file: a file in more ranges is copied like a small file."""
_PAGE = mmap.PAGESIZE


class ParallelCopier(Copier):
    """Copies to a tmpfs; big files with all processors."""

    __slots__ = ("_can",)

    def __init__(self) -> None:
        super().__init__()
        self._can = True

    def copy_data(self, source_fd: int, target_fd: int, status: os.stat_result) -> None:
        """Copy as Copier does."""
        is_much = self._can and status.st_size >= _MUCH_BYTES
        ranges = _whole_pages(data_ranges(source_fd, status.st_size)) if is_much else ()
        some = list(islice(ranges, _MOST_RANGES))
        if some and len(some) < _MOST_RANGES:
            try:
                os.truncate(target_fd, status.st_size)
                _fill(source_fd, target_fd, status.st_size, some)
            except (OSError, *userfault.REFUSALS):  # no tmpfs, no userfaultfd, or no room
                self._can = False
                os.truncate(target_fd, 0)
            else:
                self.bytes += status.st_size
                return
        super().copy_data(source_fd, target_fd, status)


def _fill(source_fd: int, target_fd: int, size: int, ranges: list[Range]) -> None:
    whole = -(-size // _PAGE) * _PAGE
    with (
        mapped_shared(source_fd, whole, writable=False) as source,
        mapped_shared(target_fd, whole, aligned=HUGE_BYTES) as target,
    ):
        huge = _Huge(source, target)
        left = list(_edges(ranges))
        work.run(partial(huge.fill, at, left) for start, end in ranges for at in blocks(start, end))
        with userfault.registered(target, whole) as fd:
            work.run(
                partial(_fill_small, fd, source, target, start, end)
                for start, end in pieces(left)
            )  # fmt: skip


class _Huge:
    """Fills huge pages. source, target: addresses."""

    def __init__(self, source: int, target: int) -> None:
        self._source, self._target = source, target
        self._pages = HugePages()

    def fill(self, at: int, left: list[Range]) -> None:
        """Fill a huge page at an offset, as far as possible. left: gets the unfilled range."""
        populate_read(self._source + at, HUGE_BYTES)
        made = self._pages.make(self._target + at)
        if made:
            copy_memory(self._target + at, self._source + at, made)
        if made < HUGE_BYTES:
            left.append((at + made, at + HUGE_BYTES))  # is atomic


def _fill_small(fd: int, source: int, target: int, start: int, end: int) -> None:
    populate_read(source + start, end - start)  # a copy that meets a missing page starts again
    userfault.copy_all(fd, target + start, source + start, end - start)


def _whole_pages(ranges: Iterable[Range]) -> Iterator[Range]:
    """Yields each page once: blocks of a file system may be smaller than a page."""
    behind = 0
    for first, last in ranges:
        start = max(behind, first // _PAGE * _PAGE)
        behind = max(start, -(-last // _PAGE) * _PAGE)
        if start < behind:
            yield start, behind


def _edges(ranges: Iterable[Range]) -> Iterator[Range]:
    """Yields the ranges that are in no whole huge page."""
    for start, end in ranges:
        inner = blocks(start, end)
        yield from ((start, inner[0]), (inner[-1] + HUGE_BYTES, end)) if inner else ((start, end),)
