"""Requirements on the knowledge of a child: its memory at the fork, though the child runs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from shim.kernel import userfault
from shim.kernel.userfault import FAULT, FORK, PAGE, REMAP, REMOVE, UNMAP, Changing, Gone, Message
from shim.memory.extents import Extents
from shim.memory.serve import forked
from shim.memory.serve.forked import Children, Forked, Patience

if TYPE_CHECKING:
    from collections.abc import Callable

FD = 7
PLACES = {number * PAGE for number in range(16)}


@dataclass
class Child:
    """A child that makes its changes one after the other, and waits until each was read."""

    has: set[int] = field(default_factory=lambda: PLACES - {PAGE * 9})
    changes: list[Message] = field(default_factory=list)
    late: int = 0
    """The number of questions before the child goes on after a read change."""
    asked: list[int] = field(default_factory=list)

    def is_registered(self, fd: int, address: int, size: int = PAGE) -> bool:
        assert fd == FD
        self.asked.append(address)
        if self.changes or self.late:
            raise Changing
        return set(range(address, address + size, PAGE)) <= self.has

    def messages(self, fd: int) -> list[Message]:
        assert fd == FD
        if self.changes:
            change = self.changes.pop(0)
            if change.kind in (UNMAP, REMAP):
                self.has -= set(range(change.start, change.end, PAGE))
            if change.kind == REMAP:
                self.has |= {change.to}
            return [change]
        self.late = max(0, self.late - 1)
        return []


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Child:
    found = Child()
    monkeypatch.setattr(userfault, "is_registered", found.is_registered)
    monkeypatch.setattr(userfault, "messages", found.messages)
    monkeypatch.setattr(forked, "_PAUSE_S", 0.0)
    return found


def page(number: int) -> int:
    return number * PAGE


def had(of: Forked, numbers: list[int]) -> list[bool | None]:
    return [of.had(page(number)) for number in numbers]


def test_child_that_stands_still_is_asked(child: Child) -> None:
    its = Forked(FD, Patience())
    assert had(its, [1, 9, 1]) == [True, False, True]
    assert child.asked == [page(1), page(9)], "nothing is asked twice: the child runs"
    assert its.told == []


def test_child_had_its_present_memory_except_changed_places(child: Child) -> None:
    child.changes = [Message(UNMAP, page(2), page(4)), Message(FAULT, page(6))]
    child.late = 3
    its = Forked(FD, Patience())
    assert had(its, [1, 9, 4, 6]) == [True, False, True, True]
    assert had(its, [2, 3]) == [None, None], "it can have unmapped what was nothing"
    assert [[each.start for each in read] for read in its.told] == [[page(2)], [page(6)]]


def test_child_had_the_memory_that_it_moves_and_empties(child: Child) -> None:
    child.changes = [
        Message(REMAP, page(2), page(3), page(9)), Message(REMOVE, page(5), page(6)),
        Message(FORK, 12),
    ]  # fmt: skip
    its = Forked(FD, Patience())
    assert had(its, [1, 2, 5, 12]) == [True, True, True, True]
    assert had(its, [9]) == [None], "what was where it moved to is not known"


def test_short_lived_memory_of_a_child_is_not_inherited(child: Child) -> None:
    child.changes = [
        Message(REMAP, page(2), page(3), page(9)), Message(REMAP, page(9), page(10), page(2))
    ]  # fmt: skip
    assert had(Forked(FD, Patience()), [1, 2, 9]) == [True, None, None]


def gone(*_: object) -> bool:
    raise Gone


def changing(*_: object) -> bool:
    raise Changing


def busy(_: int) -> list[Message]:
    return [Message(REMOVE, page(100), page(101))]


@pytest.mark.parametrize(("answer", "told"), [(gone, None), (changing, None), (changing, busy)])
def test_ended_or_restless_child_is_not_awaited(
    child: Child,
    monkeypatch: pytest.MonkeyPatch,
    answer: Callable[..., bool],
    told: Callable[[int], list[Message]] | None,
) -> None:
    monkeypatch.setattr(userfault, "is_registered", answer)
    monkeypatch.setattr(userfault, "messages", told or child.messages)
    monkeypatch.setattr(forked, "_PATIENCE_S", 0.02)
    began = time.monotonic()
    patience = Patience()
    for _ in range(20):
        assert had(Forked(FD, patience), list(range(100))) == [None] * 100
    assert time.monotonic() - began < 1, "it is waited for once, not for each place and child"


def test_children_are_asked_at_once_about_all_places_of_events(child: Child) -> None:
    children = Children()
    children.look_at([Message(UNMAP, page(2), page(4)), Message(FORK, FD)], Extents())
    children.look_at([Message(FORK, FD), Message(REMAP, page(5), page(6), page(9))], Extents())
    child.changes = [Message(UNMAP, page(0), page(16))]
    assert [children.had(FD, page(number)) for number in (2, 4, 5, 6, 9)] == [
        True, True, True, True, False,
    ]  # fmt: skip
    assert children.had(FD, page(1)) is None
    assert len(children.told(FD)) == 1, "what it told is for whoever takes events into account"


def test_children_are_asked_at_once_about_all_known_areas(child: Child) -> None:
    children = Children()
    areas = Extents([(page(0), page(4), 0), (page(8), page(10), 0), (page(9), page(10), 0)])
    children.look_at([Message(FORK, FD)], areas)
    child.changes = [Message(UNMAP, page(0), page(16))]
    places = (0, 1, 3, 8, 9, 5)
    assert [children.had(FD, page(each)) for each in places] == [
        True, True, True, True, False, None,
    ]  # fmt: skip


def test_changing_child_is_not_awaited_before_it_matters(child: Child) -> None:
    child.changes = [Message(UNMAP, page(2), page(4))]
    its = Forked(FD, Patience())
    its.look_at([page(1)])
    assert its.told == []
    assert had(its, [1]) == [True]
