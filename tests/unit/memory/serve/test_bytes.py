"""The bytes between a page server, the swap, the guard and the filler stand in one module."""

from __future__ import annotations

import ast
from pathlib import Path

from shim.memory.serve import messages
from shim.restore import memory


def spelled(path: Path) -> list[int]:
    """Returns the lines of a module with a literal of a single byte."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, bytes) and len(node.value) == 1
    ]


def test_no_other_module_spells_a_message() -> None:
    own = Path(messages.__file__)
    assert spelled(own)
    others = [*own.parent.glob("*.py"), Path(memory.__file__)]
    assert [path.name for path in others if path != own and spelled(path)] == []


def test_messages_of_one_direction_differ() -> None:
    to_swap = (
        messages.READY,
        messages.FILLED,
        messages.ORDINARY,
        messages.DAMAGED,
        messages.FAILED,
    )
    of_filler = (messages.ALL_ASKED, messages.DAMAGED, messages.FAILED)
    to_guard = (messages.HOLD, messages.COMPLETE, messages.DISMISSED)
    for direction in (to_swap, of_filler, to_guard):
        assert len(set(direction)) == len(direction)
        assert {len(each) for each in direction} == {1}
