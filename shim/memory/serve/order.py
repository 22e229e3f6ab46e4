"""Finds the order of events that were reported at the same time. Pure.

The kernel queues an event after it has unlocked the address space. When two threads change the
space at the same time, the second event may be reported first; the event of a thread that loses its
processor in between comes milliseconds late. The order matters where the kernel gives an address
away again: a thread moves an area away, another thread moves an area to the same place, and their
messages come the other way round. And the kernel reports a move by two messages, the arrival and
the end of the old place; no message says whether the second will come (with MREMAP_DONTUNMAP none
comes).

So we search for an order in which everything was possible: an area that moves was there, it arrives
at a free place, the result agrees with the ranges that are registered now, and each child has
registered the ranges of the moment of its fork. Of several orders we take the order in which the
fewest events were reported late. Two more facts are certain. A thread goes on when its event was
read, and a thread at a time works on the same memory: so changes of the same memory are reported in
the order in which they happen. And MADV_DONTNEED takes effect only after its event was reported.

Messages are read in turns; between two turns, a thread that is late has time to report
(`shim.memory.serve.space`). Two messages of the same turn come from two threads, nearly always: so
an unmap is not the end of a move of the same turn. And the more turns pass, the less likely an
event happened before them.

The kernel reports no event when an area grows in its place. So the range directly behind an area
may be registered although no event says so.
"""

from __future__ import annotations

from shim.kernel.userfault import FORK, PAGE, REMAP, REMOVE, UNMAP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from shim.kernel.userfault import Message
    from shim.memory.extents import Extent, Extents

ZEROS = 1 << 62
"""Origins from here on mean memory without content."""
IMPOSSIBLE = 1 << 20
_AT_ONCE = 4
"""The cost of assuming that two events of a turn come from one thread, which waits in between."""
_MOST_EVENTS = 200
_MOST_STEPS = 5000
"""Steps of a search, half a second; after that, events are applied as they were reported."""


class Memory:
    """Maps the registered part of the events' ranges to where each piece came from.

    known: the state before all events. ranges: the ranges of the events. around: the areas
    registered elsewhere.
    """

    __slots__ = ("_around", "_now", "_ranges")

    def __init__(self, known: Extents, ranges: Extents, around: Extents) -> None:
        self._now, self._ranges, self._around = known, ranges, around

    def copy(self) -> Memory:
        """Returns a copy that changes independently."""
        return Memory(self._now.copy(), self._ranges, self._around)

    def origins(self) -> list[Extent]:
        """Returns the registered ranges, each with its address before all events.

        An address from ZEROS on means memory without content.
        """
        return [(start, end, state & _ADDRESS) for start, end, state in self._now]

    def is_used(self, start: int, end: int) -> bool:
        """Whether any page of a range is registered."""
        return bool(self._now.within(start, end))

    def has(self, address: int) -> bool:
        """Whether a page is registered, as far as we know."""
        return self.is_used(address, address + PAGE)

    def growth(self, address: int) -> int:
        """Returns the cost of assuming that an area has grown to an unknown page."""
        before = address - PAGE
        if self.has(before) or self._around.within(before, address):
            return 0
        return 1 if self._ranges.within(before, address) else IMPOSSIBLE

    def doubt(self, start: int, end: int) -> int:
        """Returns the cost of assuming that all of a range is registered, as a single area."""
        at, doubt, came = start, 0, -1
        for begin, until, state in [*self._now.within(start, end), (end, end, -1)]:
            doubt += self.growth(at) if at < begin else 0
            doubt += begin == at and came not in (-1, state >> _CAME) and begin < end
            at, came = until, state >> _CAME
        return doubt

    def was_told(self, start: int, end: int, before: int) -> bool:
        """Whether all events that changed a range were reported before event number `before`."""
        found = self._now.within(start, end)
        return all(state >> _LAST & _NUMBER <= before for _, _, state in found)

    def take(self, start: int, end: int) -> None:
        """Mark a range as not registered."""
        self._now.take(start, end)

    def empty(self, start: int, end: int, when: int) -> None:
        """Mark a range as without content. when: the number of the event."""
        found = self._now.take(start, end)
        for begin, until, state in [*found, *([] if found else [(start, end, 0)])]:
            self._now.put([(begin, until, _state(state >> _CAME, when, ZEROS))])

    def move(self, event: Message, when: int, leaves: bool) -> None:
        """Move a range. leaves: the old place stays registered and empty (MREMAP_DONTUNMAP)."""
        shift = event.to - event.start
        taken = self._now.take(event.start, event.end)
        self._now.put([(event.to, event.to + event.end - event.start, _state(when, when, ZEROS))])
        for start, end, state in taken:
            now = _state(when, when, state & _ADDRESS)
            self._now.put([(start + shift, end + shift, now)])
        if leaves:
            self._now.put([(event.start, event.end, _state(when, when, ZEROS))])


_ADDRESS, _LAST, _CAME = (1 << 64) - 1, 64, 96
_NUMBER = (1 << 32) - 1


def _state(came: int, last: int, origin: int) -> int:
    """Packs the state of a page into a number, the origin lowest, so that clipping works.

    came, last: the numbers of the event that brought the page, and of its last event; 0 for none.
    """
    return came << _CAME | last << _LAST | origin


class _TooMany(Exception):
    """The search took too many steps."""


class Order:
    """Searches for the order of a group of events, which are numbered as they were reported.

    child_has, bounds: whether a child has registered each of these addresses. surprises: the cost
    of assuming that no event is missing, given the ranges that are registered now.
    """

    def __init__(
        self,
        events: Sequence[Message],
        bounds: Sequence[int],
        child_has: Callable[[int, int], bool | None],
        surprises: Callable[[Memory], int],
    ) -> None:
        self._events, self._bounds = dict(enumerate(events, 1)), bounds
        self._child_has, self._surprises = child_has, surprises
        self._steps = 0
        self._failed: dict[object, int] = {}

    def found(self, memory: Memory) -> tuple[Memory, dict[int, Memory]]:
        """Returns the memory after all events, and each fork's memory by the child's descriptor."""
        numbers = tuple(range(1, len(self._events) + 1))
        try:
            for late in range(self._most() if len(numbers) <= _MOST_EVENTS else 0):
                if found := self._from(memory, numbers, late, {}):
                    return found
        except _TooMany:
            pass
        return self._as_told(memory)

    def _most(self) -> int:
        """Returns the highest lateness that all events together can have."""
        turns = [event.turn for event in self._events.values()]
        return len(turns) + max(turns, default=0) - min(turns, default=0)

    def _from(
        self, memory: Memory, rest: tuple[int, ...], late: int, forks: dict[int, Memory]
    ) -> tuple[Memory, dict[int, Memory]] | None:
        """Search an order of `rest`. late: the lateness that `rest` may still have in all."""
        if not rest:
            return (memory, forks) if self._surprises(memory) <= late else None
        self._steps += 1
        if self._steps > _MOST_STEPS:
            raise _TooMany
        known = rest, tuple(memory.origins())
        if self._failed.get(known, -1) >= late:
            return None
        for number in rest if late else rest[:1]:
            event, budget = self._events[number], late - self._lateness(number, rest)
            if budget < 0 or (event.kind == REMOVE and number != rest[0]):
                continue
            others = _without(rest, number)
            for after, left, cost in self._happens(memory, number, others):
                its = forks | {event.start: memory} if event.kind == FORK else forks
                if cost <= budget and (found := self._from(after, left, budget - cost, its)):
                    return found
        self._failed[known] = late
        return None

    def _happens(
        self, memory: Memory, number: int, others: tuple[int, ...]
    ) -> Iterator[tuple[Memory, tuple[int, ...], int]]:
        """Yields each way in which an event may happen: memory afterwards, events left, cost."""
        event = self._events[number]
        if event.kind == FORK:
            yield memory, others, sum(self._doubt(event.start, at, memory) for at in self._bounds)
        elif not memory.was_told(event.start, event.end, number):
            return
        elif event.kind == UNMAP:
            after = self._applied(memory, number)
            doubt = 0 if memory.is_used(event.start, event.end) else memory.growth(event.start)
            for move in self._over(number, others):
                left = _without(others, move)
                for then, rest, cost in self._happens(after, move, left):
                    yield then, rest, cost + doubt
            yield after, others, doubt
        else:
            doubt = memory.doubt(event.start, event.end)
            if event.kind == REMOVE:
                yield self._applied(memory, number), others, doubt
            elif not memory.is_used(event.to, event.to + event.end - event.start):
                end, unlikely = self._its_end(number, others)
                if end:
                    left = _without(others, end)
                    yield self._applied(memory, number, leaves=False), left, doubt + unlikely
                yield self._applied(memory, number), others, doubt + 2 * (end and not unlikely)

    def _lateness(self, number: int, rest: tuple[int, ...]) -> int:
        """Returns the cost of taking this event before others of `rest` that were reported earlier.

        Each turn that passed gave the event time to be reported, and so raises the cost.
        """
        event = self._events[number]
        if number == rest[0]:
            return 0
        told = [self._events[each] for each in rest if each < number]
        ends = (REMAP, event.start, event.end)  # more likely the end of that move
        is_end = event.kind == UNMAP and any((e.kind, e.start, e.end) == ends for e in told)
        return max(1, event.turn - told[0].turn) + is_end

    def _over(self, number: int, others: tuple[int, ...]) -> Iterator[int]:
        """Yields moves that may have freed their own place: MREMAP_FIXED does both at once."""
        for other in others:
            each = self._events[other]
            if other > number and each.kind == REMAP and each.to == self._events[number].start:
                yield other

    def _its_end(self, number: int, others: tuple[int, ...]) -> tuple[int, int]:
        """Returns the event that reports the end of a move's old place, and that assumption's cost.

        The end more likely belongs to the last such move of an earlier turn. The event is 0 when
        there is none.
        """
        event, moved = self._events[number], list[int]()
        for other in others:
            each = self._events[other]
            if other > number and (each.start, each.end) == (event.start, event.end):
                if each.kind == UNMAP:
                    is_at_once = 0 < event.turn == each.turn
                    is_later = any(turn < each.turn or not turn for turn in moved)
                    return other, 2 * is_later + _AT_ONCE * is_at_once
                moved.append(each.turn)
        return 0, 0

    def _applied(self, memory: Memory, number: int, leaves: bool = True) -> Memory:
        event, after = self._events[number], memory.copy()
        if event.kind == REMAP:
            after.move(event, number, leaves)
        elif event.kind == UNMAP:
            after.take(event.start, event.end)
        elif event.kind == REMOVE:
            after.empty(event.start, event.end, number)
        return after

    def _doubt(self, child: int, address: int, memory: Memory) -> int:
        """Returns the cost of assuming that a child, given its addresses, forked at this memory."""
        had = self._child_has(child, address)
        if had is None or had == memory.has(address):
            return 0
        return memory.growth(address) if had else IMPOSSIBLE

    def _as_told(self, memory: Memory) -> tuple[Memory, dict[int, Memory]]:
        forks = {}
        for number, event in self._events.items():
            if event.kind == FORK:
                forks[event.start] = memory
            memory = self._applied(memory, number)
        return memory, forks


def _without(numbers: tuple[int, ...], number: int) -> tuple[int, ...]:
    return tuple(each for each in numbers if each != number)
