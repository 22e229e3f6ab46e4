"""In which order events happened that were told at the same time, and what follows from them. Pure.

The kernel queues an event after it has unlocked the address space. When two threads change it at
the same time, the second event may be told first. It matters where the kernel gives an address
away again: one thread unmaps an area, another one moves an area to the same place, and their
messages come the other way round. And a move is told in two messages, its arrival and the end of
its old place, between which others can arrive there.

So all events that are under way at the same time are read before any is applied (see
`shim.memory.space`), and places are looked at one by one. A place has occupants one after another:
the first was there before, the others arrived by a move. That one can arrive, the one before must
have left; and who acts on what has arrived does so after the arrival was told, because the thread
that moved it waited until then. So the messages about the end of an occupant are in the order of
the occupants, whatever else is mixed with them. Whether there was a first one follows from the
count, and from whether the place is registered now.

A child has the memory of the moment of its fork, which may be another one than that when the fork
was told. What it has registered says which.
"""

from __future__ import annotations

from bisect import bisect_left

from shim.kernel.userfault import FORK, PAGE, REMAP, REMOVE, UNMAP, Message
from shim.memory.extents import Extents

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from shim.memory.extents import Extent

_NEVER = 1 << 62


def settle(
    events: Sequence[Message], missing: Extents, areas: Extents,
    is_registered: Callable[[int, int], bool], child_has: Callable[[int, int], bool | None],
) -> list[tuple[int, Extents, Extents]]:  # fmt: skip
    """Take all events into account, in the order in which they were read.

    areas: what is registered, as far as is known: an area that grows does not tell. is_registered:
    whether all between two addresses is, as one area, now that all has happened. What it raises is
    passed on; `missing` and `areas` are as before then. child_has: whether the child of a
    descriptor has an address registered; None when it cannot be told any more. Returns for each
    fork the descriptor, and both as the child has them.
    """
    if not any(event.kind in (REMAP, FORK) for event in events):
        for event in events:
            missing.take(event.start, event.end)
            if event.kind == UNMAP:
                areas.take(event.start, event.end)
        return []
    history = _History(events, missing, areas, is_registered)
    return history.replayed(missing, areas, child_has)


class _Move:
    """A REMAP. ends: its old place was given up. last: what brought there what it moves. next: who
    arrived there afterwards. arrived: those that it brought. over: who was at its target before.
    """

    __slots__ = ("arrived", "ends", "is_asked", "last", "next", "over", "start", "to", "when")

    def __init__(self, when: int, event: Message) -> None:
        self.when, self.start, self.to = when, event.start, event.to
        self.ends = self.is_asked = False
        self.last: _Move | None = None
        self.next: _Move | None = None
        self.arrived: list[_Occupant] = []
        self.over: list[_Occupant] = []

    def was_before(self, fork: int, had: Callable[[int], bool | None]) -> bool:
        """Whether a child that was told of at `fork` has it behind it."""
        has_source, has_target = had(self.start), had(self.to)
        if has_source is None or has_target is None:
            return self.when < fork
        if not self.is_asked:
            self.is_asked = True  # no circle, whatever was told
            followed = self.next is not None and self.next.was_before(fork, had)
            follows = self.last is None or self.last.was_before(fork, had)
            self.is_asked = False
            if followed or not follows:
                return followed
        if not has_source:
            return has_target or self.when < fork
        if has_target and not self.over:
            return True
        if self.ends:
            return False
        # It leaves zeros behind, and its target was in use before, or is not any more.
        if has_target:
            return self.when < fork or any(each.ended < fork for each in self.over)
        return self.when < fork and any(each.ended < fork for each in self.arrived)


class _Occupant:
    """Who is at a place. by: how it came. versions: when it changed to which content."""

    __slots__ = ("by", "ended", "left", "versions")

    def __init__(self, when: int, content: list[Extent], by: _Move | None) -> None:
        self.versions = [(when, content, False)]
        self.by = by
        self.left: _Move | None = None
        self.ended = _NEVER

    def emptied(self, when: int, left: _Move | None = None) -> list[Extent]:
        """It has no content any more; returns what it had."""
        content = self.versions[-1][1]
        self.left = left or self.left
        self.versions.append((when, [], left is not None))
        return content

    def at_fork(self, fork: int, had: Callable[[int], bool | None]) -> list[Extent]:
        """What a child has of it."""
        content = self.versions[0][1]
        has_left = bool(self.left and self.left.was_before(fork, had))
        if has_left:
            return []
        for when, then, by_leaving in self.versions:
            if when < fork and not by_leaving:
                content = then
        return content


class _Place:
    """A range of addresses that every event is about as a whole, or not at all.

    arrivals, ends, leaves: how many are told of. overtaken: how many of the arrivals before an end
    that must have been earlier. was_seen: somebody did something before anybody arrived.
    """

    __slots__ = (
        *("arrivals", "end", "ends", "is_grown", "is_registered", "is_touched"),
        *("last_arrival", "leaves", "occupants", "overtaken", "start", "target", "was_seen"),
    )

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end
        self.arrivals = self.ends = self.leaves = 0
        self.is_touched = self.is_registered = self.is_grown = self.was_seen = False
        self.target, self.last_arrival = start, -1
        self.overtaken = 0
        self.occupants: list[_Occupant] = []

    def count(self, event: Message) -> None:
        """An event, which is not about who arrives here."""
        self.is_touched = True
        self.was_seen = self.was_seen or not self.arrivals
        self.ends += event.kind == UNMAP
        self.leaves += event.kind == REMAP

    def count_arrival(self, when: int, target: int) -> None:
        """Somebody arrives here."""
        self.is_touched = True
        self.overtaken += self.arrivals > self.ends
        self.arrivals, self.last_arrival, self.target = self.arrivals + 1, when, target

    def was_occupied(self, is_known: bool, is_registered: bool) -> bool:
        """Whether there was somebody before all of it. is_registered: whether it is now."""
        if not self.arrivals or is_known or self.was_seen:
            return True
        # Nothing tells of an area that grew to here: then it begins before the place.
        if not self.overtaken and self.is_grown:
            return False
        return is_registered + self.ends > self.arrivals

    def is_of_another(self, is_registered: Callable[[int, int], bool]) -> bool:
        """Whether the area that is here now is not that of who arrived last."""
        begin, end = self.target, self.start + PAGE
        return not is_registered(begin, end) or is_registered(begin - PAGE, end)

    def present(self) -> list[_Occupant]:
        """Those of whose end nothing was told so far."""
        return [each for each in self.occupants if each.ended == _NEVER]

    def mover(self) -> _Occupant | None:
        """Who has just moved from here: the first, but for one that is known to have moved and
        whose end, too, is still to be told.
        """
        present = self.present()
        ends = self.ends - sum(each.ended != _NEVER for each in self.occupants)
        for number, each in enumerate(present):
            if not each.left and (not number or ends > number):
                return each
        return present[0] if present else None

    def happens(self, when: int, event: Message) -> None:
        """It is given up, or emptied."""
        present = self.present()
        if event.kind == REMOVE and present:
            present[-1].emptied(when)
        elif event.kind == UNMAP and present:
            present[0].ended = when
            if present[0].left:
                present[0].left.ends = True

    def at_fork(self, fork: int, had: Callable[[int], bool | None]) -> list[Extent]:
        """What a child has at this place."""
        contents = [
            content for each in self.occupants for _, content, _ in each.versions if content
        ]
        if not contents:
            return []
        # All of what arrived was registered; what was there before had content at this address.
        has = had(self.start if self.arrivals else contents[0][0][0])
        if has is False:
            return []
        for each in reversed(self.occupants):
            if each.by and not each.by.was_before(fork, had):
                continue
            if has is None and each.ended < fork:
                return []
            return each.at_fork(fork, had)
        return []


class _History:
    """All that happened at each place."""

    def __init__(
        self, events: Sequence[Message], missing: Extents, areas: Extents,
        is_registered: Callable[[int, int], bool],
    ) -> None:  # fmt: skip
        self._events = events
        bounds: set[int] = set()
        for event in events:
            for start, end in _ranges(event):
                bounds |= {start, end}
        self._bounds = sorted(bounds)
        self._places = [
            _Place(start, end)
            for start, end in zip(self._bounds, self._bounds[1:])  # noqa: B905
        ]
        for when, event in enumerate(events):
            for each in self._at(event.start, event.end) if event.kind != FORK else ():
                each.count(event)
            for each in self._targets(event):
                each.count_arrival(when, event.to)
        self._look(is_registered)
        self._grown = [each for end in bounds for each in _grown(end, areas, is_registered)]
        for each in self._touched():
            content = missing.take(each.start, each.end)
            known = areas.take(each.start, each.end)
            was = each.was_occupied(bool(content or known), each.is_registered)
            if was:
                each.occupants.append(_Occupant(-1, content, None))
            each.is_registered = each.is_registered or bool(known and not each.ends)

    def _look(self, is_registered: Callable[[int, int], bool]) -> None:
        """What is there now, and whether it is who arrived last, or has grown to here."""
        latest = -1
        for each in self._places:
            if not is_registered(each.start - PAGE, each.start + PAGE):
                latest = -1
            if each.arrivals:
                each.is_registered = is_registered(each.start, each.start + PAGE)
                each.is_grown = each.is_registered and (
                    latest > each.last_arrival or each.is_of_another(is_registered)
                )
            latest = max(latest, each.last_arrival)

    def _touched(self) -> list[_Place]:
        return [each for each in self._places if each.is_touched]

    def replayed(
        self, missing: Extents, areas: Extents, child_has: Callable[[int, int], bool | None]
    ) -> list[tuple[int, Extents, Extents]]:  # fmt: skip
        """Let it happen. Returns what `settle` does."""
        for when, event in enumerate(self._events):
            if event.kind == REMAP:
                self._move(when, event)
            elif event.kind != FORK:
                for place in self._at(event.start, event.end):
                    place.happens(when, event)
        children = [
            (event.start, *self._child(when, event.start, (missing, areas), child_has))
            for when, event in enumerate(self._events)
            if event.kind == FORK
        ]
        areas.put(self._grown)
        for place in self._places:
            for last in place.present()[-1:]:
                missing.put(last.versions[-1][1])
            if place.is_registered:
                areas.put([(place.start, place.end, 0)])
        return children

    def _move(self, when: int, event: Message) -> None:
        move, taken, shift = _Move(when, event), Extents(), event.to - event.start
        for place in self._at(event.start, event.end):
            if mover := place.mover():
                content = mover.emptied(when, move)
                move.last = move.last or mover.by
                taken.put((start + shift, end + shift, offset) for start, end, offset in content)
                for behind in place.occupants[place.occupants.index(mover) + 1 :][:1]:
                    move.next = move.next or behind.by
        for place in self._targets(event):
            move.over += place.occupants
            for before in place.occupants:
                if before.left:
                    before.left.next = before.left.next or move
            move.arrived.append(_Occupant(when, taken.within(place.start, place.end), move))
            place.occupants.append(move.arrived[-1])

    def _child(
        self, fork: int, fd: int, rest: tuple[Extents, Extents],
        child_has: Callable[[int, int], bool | None],
    ) -> tuple[Extents, Extents]:  # fmt: skip
        def had(address: int) -> bool | None:
            return child_has(fd, address)

        missing, areas = rest[0].copy(), rest[1].copy()
        for place in self._touched():
            missing.put(place.at_fork(fork, had))
            if had(place.start):
                areas.put([(place.start, place.end, 0)])
        return missing, areas

    def _at(self, start: int, end: int) -> list[_Place]:
        return self._places[bisect_left(self._bounds, start) : bisect_left(self._bounds, end)]

    def _targets(self, event: Message) -> list[_Place]:
        if event.kind != REMAP:
            return []
        return self._at(event.to, event.to + event.end - event.start)


def _grown(
    end: int, areas: Extents, is_registered: Callable[[int, int], bool]
) -> list[Extent]:  # fmt: skip
    """What lies behind the end of a range and is registered, though nobody has told of it."""
    size, step, is_longer = 0, 0 if areas.within(end, end + PAGE) else PAGE, True
    while PAGE <= step < _NEVER:
        if is_registered(end, end + size + step):
            size, step = size + step, step * 2 if is_longer else step // 2
        else:
            is_longer, step = False, step // 2
    return [(end, end + size, 0)] if size else []


def _ranges(event: Message) -> Iterable[tuple[int, int]]:
    if event.kind != FORK:
        yield event.start, event.end
    if event.kind == REMAP:
        yield event.to, event.to + event.end - event.start
