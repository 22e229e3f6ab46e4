"""Records the memory that restored containers ask for first, to fill it first next time. Lean.

A file for each snapshot, `working-sets/ID.json`: `{"schema": 1, "windows": [[pid, address], …]}` in
the order of the first faults. Nothing but the order of filling depends on the file.
"""

from __future__ import annotations

import itertools
import os

from shim.contract import jsontext
from shim.contract.paths import WORKING_SETS
from shim.kernel import replace
from shim.memory.serve.space import AROUND_BYTES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_SCHEMA = 1
_MAX_WINDOWS = 32768
"""2 GiB. A larger set is no working set."""
_MAX_BYTES = 4 << 20
_TOGETHER = 1024
"""Windows: 64 MiB, filled in 20 ms."""
_GAP_BYTES = AROUND_BYTES
_RANGE_BYTES = 1 << 20
"""A page fault may have to wait for a range."""


class Recorder:
    """Records the windows in which processes asked for content, in order."""

    def __init__(self) -> None:
        self._windows: dict[tuple[int, int], None] = {}

    def asked(self, pid: int, address: int) -> None:
        """Record that a process touched an address whose content was missing."""
        if len(self._windows) < _MAX_WINDOWS:
            self._windows[pid, address - address % AROUND_BYTES] = None

    def after(self, known: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Returns the known windows, and behind them the new ones."""
        return list(dict.fromkeys([*known, *self._windows]))[:_MAX_WINDOWS]


def ranges(windows: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Returns pid, first address and end of each range to be filled first, in this order.

    A thousand windows at a time are sorted by address, and windows that nearly touch are joined: a
    hundred small copies take ten times as long as a large copy, and replicas differ in the order in
    which they ask.
    """
    found: list[tuple[int, int, int]] = []
    for at in range(0, len(windows), _TOGETHER):
        for pid, start in sorted(windows[at : at + _TOGETHER]):
            if found and found[-1][0] == pid and _touches(found[-1], start):
                found[-1] = pid, found[-1][1], start + AROUND_BYTES
            else:
                found.append((pid, start, start + AROUND_BYTES))
    return found


def _touches(before: tuple[int, int, int], start: int) -> bool:
    _, begin, end = before
    return end <= start <= end + _GAP_BYTES and start + AROUND_BYTES - begin <= _RANGE_BYTES


def read(snapshot: str, directory: str = WORKING_SETS) -> list[tuple[int, int]]:
    """Returns the windows that earlier restores from the snapshot asked for; empty when unknown."""
    try:
        with open(f"{directory}/{snapshot}.json", "rb") as file:
            found = jsontext.parse(file.read(_MAX_BYTES))
        if not isinstance(found, dict) or found["schema"] != _SCHEMA:
            return []
        windows = [(pid, address) for pid, address in found["windows"]]
        return windows if all(type(each) is int for each in itertools.chain(*windows)) else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def write(snapshot: str, windows: Sequence[tuple[int, int]], directory: str = WORKING_SETS) -> None:
    """Replace the known windows. Raises OSError."""
    os.makedirs(directory, 0o700, exist_ok=True)
    text = jsontext.compose({"schema": _SCHEMA, "windows": windows})
    replace.put(f"{directory}/{snapshot}.json", text)
