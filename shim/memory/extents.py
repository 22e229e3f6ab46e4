"""Keeps the ranges of an address space that are missing, and their content's places. Pure.

Ranges are whole pages. A page in no extent has no content: it reads as zeros.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    Extent = tuple[int, int, int]
    """First address, the address behind the last, offset of the content in the payload."""

_BEHIND_ALL = (1 << 64,)


def joined(extents: Iterable[Extent]) -> list[Extent]:
    """Returns the extents in order; neighbours whose content is contiguous, too, are joined."""
    found: list[Extent] = []
    for start, end, offset in extents:
        if found:
            begin, behind, at = found[-1]
            if behind == start and at + behind - begin == offset:
                found[-1] = (begin, end, at)
                continue
        found.append((start, end, offset))
    return found


class Extents:
    """Holds disjoint extents in the order of their addresses."""

    __slots__ = ("_all",)

    def __init__(self, extents: Iterable[Extent] = ()) -> None:
        self._all = sorted(extents)

    def __iter__(self) -> Iterator[Extent]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def copy(self) -> Extents:
        """Returns a copy that changes independently."""
        other = Extents()
        other._all = self._all.copy()
        return other

    def within(self, start: int, end: int) -> list[Extent]:
        """Returns the extents between two addresses, clipped to them."""
        first, last = self._reach(start, end)
        return [_clipped(each, start, end) for each in self._all[first:last]]

    def take(self, start: int, end: int) -> list[Extent]:
        """Remove the extents between two addresses, and return them, clipped."""
        first, last = self._reach(start, end)
        found = self._all[first:last]
        if found:
            rest = [_clipped(found[0], 0, start), _clipped(found[-1], end, 1 << 64)]
            self._all[first:last] = [each for each in rest if each[0] < each[1]]
        return [_clipped(each, start, end) for each in found]

    def take_next(self, address: int, size: int) -> Extent | None:
        """Remove part of an extent: the first from `address` on, up to a multiple of `size`."""
        first, _ = self._reach(address, 1 << 64)
        if first == len(self._all):
            return None
        start = max(self._all[first][0], address)
        (found,) = self.take(start, min(self._all[first][1], start - start % size + size))
        return found

    def put(self, extents: Iterable[Extent]) -> None:
        """Add extents, which replace the extents at their addresses."""
        for start, end, offset in extents:
            self.take(start, end)
            at = bisect_left(self._all, (start,))
            self._all.insert(at, (start, end, offset))

    def _reach(self, start: int, end: int) -> tuple[int, int]:
        """Returns the slice of the extents that have a page between two addresses."""
        if start >= end:
            return 0, 0
        first = bisect_right(self._all, (start, *_BEHIND_ALL)) - 1
        if first < 0 or self._all[first][1] <= start:
            first += 1
        return first, max(first, bisect_left(self._all, (end,)))


def _clipped(extent: Extent, start: int, end: int) -> Extent:
    begins = max(extent[0], start)
    return begins, min(extent[1], end), extent[2] + begins - extent[0]
