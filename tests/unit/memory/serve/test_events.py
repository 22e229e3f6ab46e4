"""Requirements on a page server's knowledge of an address space: extents, the order of events."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from shim.kernel.userfault import FORK, PAGE, REMAP, REMOVE, UNMAP, Message
from shim.memory.extents import Extents, joined
from shim.memory.serve.events import settle
from tests.storm.planted import move

PAGES = 64
spans = st.tuples(st.integers(0, PAGES), st.integers(0, PAGES)).map(sorted)
changes = st.one_of(
    st.tuples(st.just("take"), spans, st.just(0)),
    st.tuples(st.just("put"), spans, st.integers(0, 1000)),
    st.tuples(st.just("move"), spans, st.integers(0, PAGES)),
)


def pages_of(extents: Extents) -> dict[int, int]:
    found = {}
    for start, end, offset in extents:
        assert start < end, "no extent is empty"
        for page in range(start, end):
            assert page not in found, "extents are disjoint"
            found[page] = offset + page - start
    return found


@given(st.lists(changes, max_size=20))
def test_extents_map_pages_to_offsets(done: list[tuple[str, list[int], int]]) -> None:
    extents, model = Extents([(0, PAGES, 5000)]), {page: 5000 + page for page in range(PAGES)}
    for what, (start, end), value in done:
        taken = {page: model.pop(page) for page in range(start, end) if page in model}
        if what == "take":
            found = extents.take(start, end)
            assert pages_of(Extents(found)) == taken
        elif what == "put":
            extents.put([(start, end, value)] if start < end else [])
            model |= {page: value + page - start for page in range(start, end)}
        else:
            move(extents, start, end, value)
            for page in range(value, value + end - start):
                model.pop(page, None)
            model |= {page - start + value: offset for page, offset in taken.items()}
        assert pages_of(extents) == model


@given(st.lists(st.tuples(st.integers(1, 3), st.booleans(), st.booleans()), max_size=20))
def test_joined_extents_are_the_same_pages_in_fewer(cut: list[tuple[int, bool, bool]]) -> None:
    """cut: sizes, and whether the address and the content continue the previous extent."""
    found: list[tuple[int, int, int]] = []
    at = offset = apart = 0
    for size, follows, goes_on in cut:
        at, offset = at + (not follows), offset + (not goes_on)
        apart += not (found and follows and goes_on)
        found.append((at, at + size, offset))
        at, offset = at + size, offset + size
    fewer = joined(found)
    assert pages_of(Extents(fewer)) == pages_of(Extents(found))
    assert len(fewer) == apart


@given(st.integers(0, PAGES), st.integers(1, 10))
def test_next_piece_is_the_first_from_an_address_on(address: int, size: int) -> None:
    extents = Extents([(4, 20, 100), (30, 40, 200)])
    before = pages_of(extents)
    found = extents.take_next(address, size)
    if found is None:
        assert not any(page >= address for page in before)
        return
    start, end, offset = found
    assert start == min(page for page in before if page >= address)
    assert end - start <= size
    assert end in (20, 40) or not end % size, "pieces of two threads share no page table"
    assert before[start] == offset
    assert pages_of(extents) == {p: o for p, o in before.items() if not start <= p < end}


A, B, C, SIZE = 0x1000, 0x9000, 0x20000, 0x4000
UNMAP_A, UNMAP_B = Message(UNMAP, A, A + SIZE), Message(UNMAP, B, B + SIZE)
UNMAP_C = Message(UNMAP, C, C + SIZE)
A_TO_B, B_TO_A = Message(REMAP, A, A + SIZE, B), Message(REMAP, B, B + SIZE, A)
B_TO_C = Message(REMAP, B, B + SIZE, C)
A_TO_C, C_TO_A = Message(REMAP, A, A + SIZE, C), Message(REMAP, C, C + SIZE, A)
OF_A, OF_B, OF_C = 0x100000, 0x200000, 0x300000
CHILD = 7
FORKED = Message(FORK, CHILD)


def left(
    events: list[Message],
    registered: set[int],
    before: dict[int, int],
    child: set[int] | None = None,
    there: tuple[int, ...] = (),
) -> dict[int, int]:
    """Returns places with missing content, or the places in the child; all of a single size.

    there: earlier registered places, besides.
    """
    areas = Extents((start, start + SIZE, 0) for start in {*before, *there})
    missing = Extents((start, start + SIZE, offset) for start, offset in before.items())
    children = settle(
        events, missing, areas, lambda start, end: start in registered and end <= start + SIZE,
        lambda _, at: at in (child or ()),
    )  # fmt: skip
    found = missing if child is None else {fd: its for fd, its, _ in children}[CHILD]
    assert all(end - start == SIZE for start, end, _ in found)
    return {start: offset for start, _, offset in found}


def test_event_that_frees_a_place_precedes_the_arrival_there() -> None:
    before = {A: OF_A, B: OF_B}
    assert left([B_TO_A, UNMAP_A, UNMAP_B], {A}, before) == {A: OF_B}
    assert left([B_TO_A, UNMAP_B, UNMAP_A], {A}, before) == {A: OF_B}
    assert left([B_TO_A, A_TO_C, UNMAP_A, UNMAP_B], {A, C}, before) == {A: OF_B, C: OF_A}


def test_freeing_precedes_arrival_also_when_nothing_is_missing() -> None:
    assert left([B_TO_A, UNMAP_A, UNMAP_B], {A}, {B: OF_B}, there=(A,)) == {A: OF_B}
    moved_on = [B_TO_A, A_TO_C, UNMAP_A, UNMAP_B]
    assert left(moved_on, {A, C}, {B: OF_B}, there=(A,)) == {A: OF_B}


def test_arrived_area_may_move_again() -> None:
    assert left([B_TO_A, UNMAP_B, UNMAP_A], set(), {B: OF_B}) == {}
    assert left([B_TO_A, UNMAP_B, A_TO_C, UNMAP_A], {C}, {B: OF_B}) == {C: OF_B}


def test_thread_may_move_an_area_to_and_fro() -> None:
    there_and_back = [A_TO_B, UNMAP_A, B_TO_A, UNMAP_B]
    assert left(there_and_back, {A}, {A: OF_A}) == {A: OF_A}
    assert left([*there_and_back, A_TO_B, UNMAP_A], {B}, {A: OF_A}) == {B: OF_A}


def test_late_unmap_of_an_old_place_does_not_end_a_later_arrival() -> None:
    assert left([A_TO_B, C_TO_A, UNMAP_A, UNMAP_C], {A, B}, {A: OF_A, C: OF_C}) == {
        B: OF_A,
        A: OF_C,
    }


def test_grown_area_is_known_from_then_on() -> None:
    """No event reports growth: the server examines the memory behind the end of a reported
    range.
    """
    areas, behind = Extents(), B + SIZE
    grown = {(B, B + PAGE), *((behind, behind + size * PAGE) for size in range(1, 6))}
    settle([A_TO_B, UNMAP_A], Extents(), areas, lambda *area: area in grown, lambda *_: None)
    found = areas.within(behind, behind + 9 * PAGE)
    assert found == [(behind, behind + 5 * PAGE, 0)]


def test_grown_part_is_known_when_only_the_area_before_it_is_unmapped() -> None:
    areas, behind = Extents([(A, A + SIZE, 0)]), A + SIZE
    grown = {(behind, behind + size * PAGE) for size in range(1, 4)}
    settle([UNMAP_A], Extents(), areas, lambda *area: area in grown, lambda *_: None)
    assert list(areas) == [(behind, behind + 3 * PAGE, 0)]


def test_child_knows_the_grown_part_of_its_parent() -> None:
    behind = A + SIZE
    assert its_areas([UNMAP_A, FORKED], behind, child={behind}) == [(behind, behind + PAGE)]
    assert its_areas([UNMAP_A, FORKED], behind, child=set()) == []


def its_areas(events: list[Message], grown: int, child: set[int]) -> list[tuple[int, int]]:
    """Returns the places that a child knows of, with A registered and two pages that no event has
    reported.
    """
    ((_, _, found),) = settle(
        events, Extents(), Extents([(A, A + SIZE, 0)]),
        lambda start, end: start == grown and end <= grown + 2 * PAGE, lambda _, at: at in child,
    )  # fmt: skip
    return [(start, end) for start, end, _ in found]


def test_middle_of_a_grown_part_can_have_moved() -> None:
    """Seen in a storm: a part of the growth behind C moves away. Another thread comes to its place.
    The growth does not count as memory of which nobody can know.
    """
    middle, d = C + 2 * SIZE, 0x80000
    events = [
        Message(REMAP, middle, middle + SIZE, d),
        Message(REMAP, B, B + SIZE, middle),
        Message(UNMAP, middle, middle + SIZE),
        UNMAP_B,
    ]
    missing, areas = Extents([(B, B + SIZE, OF_B)]), Extents([(B, B + SIZE, 0), (C, C + SIZE, 0)])
    there = [(C, middle), (middle, middle + SIZE), (d, d + SIZE)]
    settle(
        events, missing, areas,
        lambda start, end: any(first <= start and end <= last for first, last in there),
        lambda *_: None,
    )  # fmt: skip
    assert list(missing) == [(middle, middle + SIZE, OF_B)]


def test_area_that_moved_before_another_arrived_was_there() -> None:
    """Though no event reported the area: the end of its place is not the end of the other's."""
    assert left([A_TO_C, B_TO_A, UNMAP_A, UNMAP_B], {A, C}, {B: OF_B}, there=(A,)) == {A: OF_B}


def test_late_event_of_a_move_follows_arrivals_and_departures() -> None:
    """Both seen in a storm: areas that came to the old place went on with MREMAP_DONTUNMAP, before
    the first thread had the processor again.
    """
    left_b = [A_TO_B, UNMAP_A, B_TO_A]
    before = {A: OF_A, B: OF_B}
    assert left([*left_b, B_TO_C, UNMAP_B], {A, B, C}, before) == {A: OF_A, C: OF_B}
    there_again = [*left_b, UNMAP_B, A_TO_B, UNMAP_A]
    assert left([*there_again, B_TO_C, UNMAP_B], {B, C}, before) == {B: OF_A, C: OF_B}


def in_turns(*turns: list[Message]) -> list[Message]:
    """Returns messages by turns: the server read each turn together, and then the next."""
    return [
        Message(each.kind, each.start, each.end, each.to, number)
        for number, turn in enumerate(turns, 1)
        for each in turn
    ]


def test_events_read_together_come_from_different_threads() -> None:
    """Seen in a storm: a thread moves B away, over C. Another thread comes from A, goes on to D
    with MREMAP_DONTUNMAP, unmaps the place that it left, and comes back.
    """
    d = 0x80000
    goes_on, comes_back = Message(REMAP, B, B + SIZE, d), Message(REMAP, d, d + SIZE, B)
    unmap_d = Message(UNMAP, d, d + SIZE)
    before = {A: OF_A, B: OF_B, C: OF_C}
    for first in ([UNMAP_C, A_TO_B], [A_TO_B, UNMAP_C]):
        for second in ([UNMAP_A, B_TO_C], [B_TO_C, UNMAP_A]):
            for third in ([goes_on, UNMAP_B], [UNMAP_B, goes_on]):
                turns = [first, second, third, [UNMAP_B], [comes_back]]
                assert left(in_turns(*turns), {B, C, d}, before) == {B: OF_A, C: OF_B}
                ended = in_turns(*turns, [unmap_d])
                assert left(ended, {B, C}, before) == {B: OF_A, C: OF_B}
                assert left(in_turns(*turns[:4]), {C, d}, before) == {d: OF_A, C: OF_B}
                assert left(in_turns(*turns[:3]), {B, C, d}, before) == {d: OF_A, C: OF_B}


def test_child_has_the_memory_of_its_fork() -> None:
    for events in ([FORKED, A_TO_B, UNMAP_A], [A_TO_B, FORKED, UNMAP_A], [A_TO_B, UNMAP_A, FORKED]):
        assert left(events, {B}, {A: OF_A}) == {B: OF_A}
        assert left(events, {B}, {A: OF_A}, child={A}) == {A: OF_A}
        assert left(events, {B}, {A: OF_A}, child={B}) == {B: OF_A}


def test_content_between_two_events_is_in_a_child_too() -> None:
    events = [UNMAP_A, UNMAP_C, FORKED]
    assert left(events, {B}, {A: OF_A, B: OF_B}, child={B}) == {B: OF_B}


class Kernel:
    """An address space of places, and threads whose messages overtake each other a little."""

    kinds: tuple[str, ...] = ("move", "move", "over", "unmap", "drop", "fork")

    def __init__(self, seed: int) -> None:
        self.chance = chance = random.Random(seed)  # noqa: S311
        places = [A * (number + 1) for number in range(12)]
        self.content: dict[int, int | None] = {
            place: place * 100 if chance.random() < 0.6 else None for place in places[:8]
        }
        self.before = {place: offset for place, offset in self.content.items() if offset}
        self.areas = Extents((place, place + A, 0) for place in self.content)
        self.free = places[8:]
        self.owned = [[place for place in self.content if place // A % 3 == n] for n in range(3)]
        self.pending: list[list[Message]] = [[], [], []]
        self.gained: list[list[int]] = [[], [], []]
        self.overtaken = [0, 0, 0]
        self.told: list[Message] = []
        self.children: dict[int, dict[int, int | None]] = {}
        self.unsure: dict[int, set[int]] = {0: set()}
        """Memory that a thread was dropping, without an event yet, when a child was forked: nothing
        reveals the order.
        """

    def is_registered(self, start: int, end: int) -> bool:
        return end - start == A and start in self.content

    def run(self, steps: int) -> None:
        for _ in range(steps):
            thread = self.chance.randrange(3)
            late = [each for each in range(3) if self.pending[each] and self.overtaken[each]]
            if late or self.pending[thread]:
                self.tell(late[0] if late else thread)
            else:
                self.begin(thread)
        for thread in range(3):
            while self.pending[thread]:
                self.tell(thread)

    def tell(self, thread: int) -> None:
        self.told.append(self.pending[thread].pop(0))
        if not self.pending[thread]:
            self.owned[thread] += self.gained[thread]
            self.gained[thread], self.overtaken[thread] = [], 0
            for other in range(3):
                self.overtaken[other] += bool(self.pending[other])

    def begin(self, thread: int) -> None:
        kind = self.chance.choice(self.kinds)
        owned = self.owned[thread]
        if kind == "fork":
            fd = len(self.children) + 100
            dropping = {each.start for told in self.pending for each in told if each.kind == REMOVE}
            self.children[fd] = {
                place: None if place in dropping else offset
                for place, offset in self.content.items()
            }
            self.unsure[fd] = dropping
            self.pending[thread] = [Message(FORK, fd)]
            return
        if not owned or (kind in ("move", "leave") and not self.free):
            return
        place = owned.pop(self.chance.randrange(len(owned)))
        ends = Message(UNMAP, place, place + A)
        if kind == "unmap":
            self.pending[thread] = [ends]
            del self.content[place]
            self.free.append(place)
        elif kind == "drop":
            self.pending[thread] = [Message(REMOVE, place, place + A)]
            for fd in [each.start for told in self.pending for each in told if each.kind == FORK]:
                self.unsure[fd].add(place)
            self.content[place] = None
            self.gained[thread] = [place]
        else:
            self.move(thread, place, kind)

    def move(self, thread: int, place: int, kind: str) -> None:
        ends, early = Message(UNMAP, place, place + A), []
        if kind == "over" and self.owned[thread]:
            to = self.owned[thread].pop()
            early = [Message(UNMAP, to, to + A)]
        elif self.free:
            to = self.free.pop()
        else:
            self.owned[thread].append(place)
            return
        self.content[to] = self.content.pop(place)
        moved = Message(REMAP, place, place + A, to)
        if kind == "leave":
            self.content[place] = None
            self.pending[thread], self.gained[thread] = [moved], [place, to]
        else:
            self.pending[thread], self.gained[thread] = [*early, moved, ends], [to]
            self.free.append(place)


def wrong(kernel: Kernel) -> tuple[int, int]:
    """Returns the number of wrong places, and the number of children with a wrong place."""
    missing = Extents((place, place + A, offset) for place, offset in kernel.before.items())
    children = settle(
        kernel.told, missing, kernel.areas, kernel.is_registered,
        lambda fd, at: at in kernel.children[fd],
    )  # fmt: skip

    def count(found: Extents, truth: dict[int, int | None], unsure: set[int]) -> int:
        there = {place: [each[2] for each in found.within(place, place + A)] for place in truth}
        return sum(
            there[place] != ([offset] if offset else [])
            for place, offset in truth.items()
            if place not in unsure
        )

    of_children = [count(its, kernel.children[fd], kernel.unsure[fd]) for fd, its, _ in children]
    return count(missing, kernel.content, set()), sum(map(bool, of_children))


class QueuedKernel(Kernel):
    """Reports events in the order of queueing, as a kernel does; but a thread may lose its
    processor between a change and its message. Uses MREMAP_DONTUNMAP, too.
    """

    kinds = (*Kernel.kinds, "leave")

    def run(self, steps: int) -> None:
        queue: list[int] = []
        asleep: set[int] = set()

        def goes_on(thread: int) -> None:
            if self.pending[thread]:
                if self.chance.random() < 0.05:
                    asleep.add(thread)
                else:
                    queue.append(thread)

        while steps or queue or asleep:
            thread = self.chance.randrange(3)
            if self.chance.random() < 0.15:
                told, queue[:] = queue.copy(), []
                for each in told:
                    self.tell(each)
                    goes_on(each)
            elif thread in asleep and self.chance.random() < 0.12:
                asleep.discard(thread)
                queue.append(thread)
            elif steps and not self.pending[thread]:
                steps -= 1
                self.begin(thread)
                goes_on(thread)


def found_wrong(kind: type[Kernel], kernels: int, steps: int) -> tuple[float, float]:
    """Returns the part of the address spaces that is wrong, and of the children."""
    all_of_them = [kind(seed) for seed in range(kernels)]
    for kernel in all_of_them:
        kernel.run(steps)
    found = [wrong(kernel) for kernel in all_of_them]
    children = sum(len(kernel.children) for kernel in all_of_them)
    return sum(bool(own) for own, _ in found) / kernels, sum(its for _, its in found) / children


def test_thread_that_loses_its_processor_is_reported_late() -> None:
    own, of_children = found_wrong(QueuedKernel, 1000, 8)
    assert own < 0.01
    assert of_children < 0.03


def test_content_is_right_though_messages_overtake_each_other() -> None:
    """Messages overtake far more often than a kernel's: they do not determine everything any
    more.
    """
    own, of_children = found_wrong(Kernel, 1000, 14)
    assert own < 0.005
    assert of_children < 0.1
