"""Requirements on what a page server knows of an address space: extents, the order of events."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shim.kernel.userfault import REMAP, REMOVE, UNMAP, Message
from shim.memory.events import ordered
from shim.memory.extents import Extents

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
def test_extents_are_a_map_from_pages_to_offsets(done: list[tuple[str, list[int], int]]) -> None:
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
            extents.move(start, end, value)
            for page in range(value, value + end - start):
                model.pop(page, None)
            model |= {page - start + value: offset for page, offset in taken.items()}
        assert pages_of(extents) == model


@given(st.integers(0, PAGES), st.integers(1, 10))
def test_the_next_piece_is_the_first_from_an_address_on(address: int, size: int) -> None:
    extents = Extents([(4, 20, 100), (30, 40, 200)])
    before = pages_of(extents)
    found = extents.take_next(address, size)
    if found is None:
        assert not any(page >= address for page in before)
        return
    start, end, offset = found
    assert start == min(page for page in before if page >= address)
    assert end - start <= size
    assert before[start] == offset
    assert pages_of(extents) == {p: o for p, o in before.items() if not start <= p < end}


A, B, C, SIZE = 0x1000, 0x9000, 0x20000, 0x4000
UNMAP_A = Message(UNMAP, A, A + SIZE)
B_TO_A = Message(REMAP, B, B + SIZE, A)
A_TO_C = Message(REMAP, A, A + SIZE, C)


def told(reads: list[list[Message]], mapped: bool) -> list[Message]:
    return ordered(reads, lambda _start, _end: mapped)


def test_what_made_a_place_free_comes_before_what_arrives_there() -> None:
    assert told([[B_TO_A, UNMAP_A]], mapped=True) == [UNMAP_A, B_TO_A]
    assert told([[B_TO_A], [UNMAP_A]], mapped=True) == [UNMAP_A, B_TO_A]
    assert told([[B_TO_A], [A_TO_C]], mapped=True) == [A_TO_C, B_TO_A]


def test_what_arrived_may_go_again() -> None:
    assert told([[B_TO_A], [UNMAP_A]], mapped=False) == [B_TO_A, UNMAP_A]
    assert told([[B_TO_A], [A_TO_C]], mapped=False) == [B_TO_A, A_TO_C]


def test_what_arrived_and_went_on_makes_room_for_the_next() -> None:
    again = Message(REMAP, 0x50000, 0x50000 + SIZE, A)
    assert told([[B_TO_A], [again], [A_TO_C]], mapped=True) == [B_TO_A, A_TO_C, again]


def test_other_events_stay_in_the_order_in_which_they_were_read() -> None:
    events = [Message(REMOVE, A, A + SIZE), B_TO_A, Message(REMOVE, A, A + SIZE)]
    assert told([events[:2], events[2:]], mapped=True) == events
