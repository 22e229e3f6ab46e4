"""In which order events happened that were told at the same time. Pure.

The kernel queues an event after it has unlocked the address space. When two threads change it at
the same time, the second event may be told first; a thread that loses its processor in between is
told of milliseconds late. It matters where the kernel gives an address away again: one thread moves
an area away, another one moves an area to the same place, and their messages come the other way
round. And a move is told in two messages, its arrival and the end of its old place; whether the
second one will come (with MREMAP_DONTUNMAP it does not) is not told.

So an order is looked for in which everything was possible: what moves was there, it arrives where
nothing was, in the end that is registered which is, and a child has registered what was at the
moment of its fork. Of several orders that one is taken in which the fewest events were told late.
Two things are certain besides. A thread goes on when its event was read, and memory is worked on by
one thread at a time: what happens to the same memory is told in the order in which it happens. And
MADV_DONTNEED takes effect only after it was told.

Messages are read in turns; between two, whoever is late has time to tell (`shim.memory.space`).
Two of one turn are of two threads, nearly always: so one is not the end of a move that the other
tells of. And the more turns pass, the less it is likely that something happened before them.

An area that grows in its place does not tell. So what lies directly behind an area may be
registered although nobody knows.
"""

from __future__ import annotations

from shim.kernel.userfault import FORK, PAGE, REMAP, REMOVE, UNMAP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from shim.kernel.userfault import Message
    from shim.memory.extents import Extent, Extents

ZEROS = 1 << 62
"""The origin of what has no content is from here on."""
IMPOSSIBLE = 1 << 20
_AT_ONCE = 4
"""How unlikely it is that two events of one thread are read together: it waits for the first."""
_MOST_EVENTS = 200
_MOST_STEPS = 5000
"""Taken in the search, half a second of it; then events are taken as they were told."""


class Memory:
    """What is registered of the ranges that events are about, and where that came from.

    known: from which on nothing has happened. ranges: what events are about. around: what is
    registered elsewhere.
    """

    __slots__ = ("_around", "_now", "_ranges")

    def __init__(self, known: Extents, ranges: Extents, around: Extents) -> None:
        self._now, self._ranges, self._around = known, ranges, around

    def copy(self) -> Memory:
        """Another one that is the same."""
        return Memory(self._now.copy(), self._ranges, self._around)

    def origins(self) -> list[Extent]:
        """Ranges, and where each was before all events; from ZEROS on when it has no content."""
        return [(start, end, state & _ADDRESS) for start, end, state in self._now]

    def is_used(self, start: int, end: int) -> bool:
        """Whether anything of a range is registered."""
        return bool(self._now.within(start, end))

    def has(self, address: int) -> bool:
        """Whether a page is registered, as far as is known."""
        return self.is_used(address, address + PAGE)

    def growth(self, address: int) -> int:
        """How unlikely it is that a page is registered although nobody knows: an area must have
        grown to there.
        """
        before = address - PAGE
        if self.has(before) or self._around.within(before, address):
            return 0
        return 1 if self._ranges.within(before, address) else IMPOSSIBLE

    def doubt(self, start: int, end: int) -> int:
        """How unlikely it is that all of a range is registered, and one area."""
        at, doubt, came = start, 0, -1
        for begin, until, state in [*self._now.within(start, end), (end, end, -1)]:
            doubt += self.growth(at) if at < begin else 0
            doubt += begin == at and came not in (-1, state >> _CAME) and begin < end
            at, came = until, state >> _CAME
        return doubt

    def was_told(self, start: int, end: int, before: int) -> bool:
        """Whether all that has happened to a range was told before that."""
        found = self._now.within(start, end)
        return all(state >> _LAST & _NUMBER <= before for _, _, state in found)

    def take(self, start: int, end: int) -> None:
        """A range is not registered any more."""
        self._now.take(start, end)

    def empty(self, start: int, end: int, when: int) -> None:
        """A range has no content any more."""
        found = self._now.take(start, end)
        for begin, until, state in [*found, *([] if found else [(start, end, 0)])]:
            self._now.put([(begin, until, _state(state >> _CAME, when, ZEROS))])

    def move(self, event: Message, when: int, leaves: bool) -> None:
        """leaves: memory without content, as MREMAP_DONTUNMAP does."""
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
    """What is known of a page in one number, the address lowest: so it is divided with a range.
    came, last: the events that brought it and that were the last about it, 0 for none.
    """
    return came << _CAME | last << _LAST | origin


class _TooMany(Exception):
    """No order was found in time."""


class Order:
    """The search for one group of events. They are known by their numbers: the order in which they
    were told. child_has, bounds: what a child has registered, at these addresses. surprises: how
    unlikely it is that these are all events, seeing what is registered now.
    """

    def __init__(
        self, events: Sequence[Message], bounds: Sequence[int],
        child_has: Callable[[int, int], bool | None], surprises: Callable[[Memory], int],
    ) -> None:  # fmt: skip
        self._events, self._bounds = dict(enumerate(events, 1)), bounds
        self._child_has, self._surprises = child_has, surprises
        self._steps = 0
        self._failed: dict[object, int] = {}

    def found(self, memory: Memory) -> tuple[Memory, dict[int, Memory]]:
        """What there is after all of them, and what each fork's child has, by its descriptor."""
        numbers = tuple(range(1, len(self._events) + 1))
        try:
            for late in range(self._most() if len(numbers) <= _MOST_EVENTS else 0):
                if found := self._from(memory, numbers, late, {}):
                    return found
        except _TooMany:
            pass
        return self._as_told(memory)

    def _most(self) -> int:
        """As late as all events can be."""
        turns = [event.turn for event in self._events.values()]
        return len(turns) + max(turns, default=0) - min(turns, default=0)

    def _from(
        self, memory: Memory, rest: tuple[int, ...], late: int, forks: dict[int, Memory]
    ) -> tuple[Memory, dict[int, Memory]] | None:  # fmt: skip
        """late: by so much some of the rest may happen before what was told before them."""
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
    ) -> Iterator[tuple[Memory, tuple[int, ...], int]]:  # fmt: skip
        """What there is after an event, for each way in which it is possible, what is left, and
        how unlikely that is.
        """
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
        """How unlikely it is that this was the next event of the rest: 0 for the one that is.

        While it was late, a turn gave it time to be told.
        """
        event = self._events[number]
        if number == rest[0]:
            return 0
        told = [self._events[each] for each in rest if each < number]
        ends = (REMAP, event.start, event.end)  # it is rather the end of that move
        is_end = event.kind == UNMAP and any((e.kind, e.start, e.end) == ends for e in told)
        return max(1, event.turn - told[0].turn) + is_end

    def _over(self, number: int, others: tuple[int, ...]) -> Iterator[int]:
        """Moves that may be what made a place free: MREMAP_FIXED does both at once."""
        for other in others:
            each = self._events[other]
            if other > number and each.kind == REMAP and each.to == self._events[number].start:
                yield other

    def _its_end(self, number: int, others: tuple[int, ...]) -> tuple[int, int]:
        """The message that tells of the end of the old place of a move, and how unlikely it is
        that it does: it is rather of the last one in a turn before it. 0 when there is none.
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
        """How unlikely it is that a child of this memory has registered what it has."""
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
