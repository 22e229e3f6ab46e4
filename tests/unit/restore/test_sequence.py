"""A swap that fails leaves no trace of its steps."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from shim.criu import options
from shim.kernel import alarm
from shim.restore import sequence
from tests.unit.tickets import a_ticket


def test_late_swap_leaves_no_mark_on_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the mark `start` would take the container for restored, and it would never run."""
    monkeypatch.setattr(sequence, "SWAPPED", str(tmp_path))
    monkeypatch.setattr(options, "write", lambda _: None)
    swap = object.__new__(sequence.Swap)
    swap.ticket, swap.work, swap.private = a_ticket(), str(tmp_path / "work"), str(tmp_path)

    def rings(path: str, mode: str) -> None:
        Path(path).open(mode).close()
        assert (tmp_path / "abc").exists()
        raise alarm.TooLate

    monkeypatch.setattr(sequence, "open", rings, raising=False)
    with pytest.raises(alarm.TooLate), ExitStack() as undo, ExitStack() as held:
        swap._start_runtime(undo, held)
    assert not (tmp_path / "abc").exists()
