"""Applies userfaultfd events to the ranges that are still missing in an address space. Pure.

All events that are under way at the same time are read before any is applied (see
`shim.memory.serve.space`), because the kernel may report events in another order than the order in
which they happened: `shim.memory.serve.order` finds the order, for each group of events about the
same memory.
"""

from __future__ import annotations

from bisect import bisect_right

from shim.kernel.userfault import FORK, PAGE, REMAP, UNMAP, Message
from shim.memory.extents import Extents
from shim.memory.serve.order import IMPOSSIBLE, ZEROS, Memory, Order

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from shim.memory.extents import Extent

_NEVER = 1 << 62


def settle(
    events: Sequence[Message],
    missing: Extents,
    areas: Extents,
    is_registered: Callable[[int, int], bool],
    child_has: Callable[[int, int], bool | None],
) -> list[tuple[int, Extents, Extents]]:
    """Apply all events to `missing` and `areas`. events: in the order in which they were read.

    areas: the registered ranges as far as we know; the kernel reports no event when an area grows.
    is_registered: whether all between two addresses is registered now, as a single area, after all
    events. child_has: whether the child behind a descriptor has an address registered; None when
    that can no longer be found out. Returns for each fork the descriptor, and the child's `missing`
    and `areas`. An exception of `is_registered` passes through, and `missing` and `areas` are
    unchanged then.
    """
    if not any(event.kind in (REMAP, FORK) for event in events):
        unmapped = [event for event in events if event.kind == UNMAP]
        grown = [each for event in unmapped for each in _grown(event.end, areas, is_registered)]
        for event in events:
            missing.take(event.start, event.end)
        for event in unmapped:
            areas.take(event.start, event.end)
        areas.put(grown)
        return []
    grown = _grown_below(events, areas, is_registered)
    known = areas.copy()
    known.put(grown)
    groups = [_Group(each, missing, known, is_registered, child_has) for each in _groups(events)]
    bounds = {bound for group in groups for bound in group.bounds}
    grown += [each for end in bounds for each in _grown(end, known, is_registered)]
    for group in groups:
        for start, end in group.ranges:
            missing.take(start, end)
            areas.take(start, end)
    children = []
    for fd in (event.start for event in events if event.kind == FORK):
        its = missing.copy(), areas.copy()
        # A later call finds how far the area has grown in the child: the rest lies behind this
        # page.
        its[1].put((start, start + PAGE, 0) for start, _, _ in grown if child_has(fd, start))
        for group in groups:
            group.put(group.forks[fd], *its)
        children.append((fd, *its))
    areas.put(grown)
    for group in groups:
        group.put(group.now, missing, areas)
    return children


class _Group:
    """Orders events about the same memory. now, forks: the memory after them, and each child's.

    ranges: the addresses that the events are about. bounds: where the range of an event begins or
    ends.
    """

    def __init__(
        self,
        events: Sequence[Message],
        missing: Extents,
        areas: Extents,
        is_registered: Callable[[int, int], bool],
        child_has: Callable[[int, int], bool | None],
    ) -> None:
        self.ranges = _united(events)
        self._is_registered = is_registered
        self._content, self._seen = Extents(), dict[int, bool]()
        origin, around = Extents(), areas.copy()
        for start, end in self.ranges:
            self._content.put(missing.within(start, end))
            known = [*missing.within(start, end), *around.take(start, end)]
            origin.put((begin, until, begin) for begin, until, _ in known)
        self.bounds = {bound for event in events for each in spans(event) for bound in each}
        order = Order(events, self._starts(list(origin)), child_has, self._surprises)
        ranges = Extents((start, end, 0) for start, end in self.ranges)
        self.now, self.forks = order.found(Memory(origin, ranges, around))
        self._correct()

    def put(self, memory: Memory, missing: Extents, areas: Extents) -> None:
        """Add the content of these ranges to `missing`, and the ranges to `areas`."""
        for start, end, origin in memory.origins():
            areas.put([(start, end, 0)])
            if origin < ZEROS:
                shift = start - origin
                for begin, until, offset in self._content.within(origin, origin + end - start):
                    missing.put([(begin + shift, until + shift, offset)])

    def _starts(self, origin: Sequence[Extent]) -> list[int]:
        """Returns the addresses in these ranges at which an event's range or an extent begins."""
        found = {*self.bounds, *(each for start, end, _ in origin for each in (start, end))}
        return sorted(each for each in found if any(s <= each < e for s, e in self.ranges))

    def _surprises(self, memory: Memory) -> int:
        """Counts places that are registered although no event says so and no area grew there.

        Returns IMPOSSIBLE when a place is not registered that must be.
        """
        count = 0
        for at in self._starts(memory.origins()):
            if memory.has(at) != self._has(at):
                if memory.has(at):
                    return IMPOSSIBLE
                count += not self._is_registered(at - PAGE, at + PAGE)
        return count

    def _has(self, address: int) -> bool:
        if address not in self._seen:
            self._seen[address] = self._is_registered(address, address + PAGE)
        return self._seen[address]

    def _correct(self) -> None:
        """Correct `now` by the kernel's answers, where an area has grown or no order was found."""
        starts = self._starts(self.now.origins())
        for at, until in zip(starts, [*starts, _NEVER][1:], strict=True):
            end = min(until, next(end for start, end in self.ranges if start <= at < end))
            if not self._has(at):
                self.now.take(at, end)
            elif not self.now.has(at):
                for start, behind, _ in _grown(at, Extents(), self._is_registered):
                    self.now.empty(start, min(behind, end), 0)


def _groups(events: Sequence[Message]) -> list[list[Message]]:
    """Groups events so that two groups have no memory in common. A fork belongs to every group."""
    starts = [start for start, _ in _united(events)]
    same_as = list(range(len(starts)))

    def group(address: int) -> int:
        found = bisect_right(starts, address) - 1
        while same_as[found] != found:
            found = same_as[found]
        return found

    for event in events:
        if event.kind == REMAP:
            same_as[group(event.start)] = group(event.to)
    members: dict[int, list[Message]] = {group(start): [] for start in starts}
    for event in events:
        for each in members if event.kind == FORK else (group(event.start),):
            members[each].append(event)
    return list(members.values()) or [list(events)]


def _united(events: Iterable[Message]) -> list[tuple[int, int]]:
    """Returns the ranges of all events, disjoint, with neighbours that touch joined."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(each for event in events for each in spans(event)):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def _grown(end: int, areas: Extents, is_registered: Callable[[int, int], bool]) -> list[Extent]:
    """Returns the registered range directly behind `end` that no event has reported."""
    size, step, is_longer = 0, 0 if areas.within(end, end + PAGE) else PAGE, True
    while PAGE <= step < _NEVER:
        if is_registered(end, end + size + step):
            size, step = size + step, step * 2 if is_longer else step // 2
        else:
            is_longer, step = False, step // 2
    return [(end, end + size, 0)] if size else []


def _grown_below(
    events: Sequence[Message], areas: Extents, is_registered: Callable[[int, int], bool]
) -> list[Extent]:
    """Returns the registered pages directly before events that no event has reported.

    So the range of an event can be the middle of an area that has grown.
    """
    ranges = Extents((start, end, 0) for start, end in _united(events))
    found = []
    for before in {event.start - PAGE for event in events if event.kind != FORK}:
        end = before + PAGE
        told = areas.within(before, end) or ranges.within(before, end)
        if not told and is_registered(before, end):
            found.append((before, end, 0))
    return found


def spans(event: Message) -> Iterable[tuple[int, int]]:
    """Returns the ranges of an event, each as the first address and the address behind."""
    if event.kind != FORK:
        yield event.start, event.end
    if event.kind == REMAP:
        yield event.to, event.to + event.end - event.start
