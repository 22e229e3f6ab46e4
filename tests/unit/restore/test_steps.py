"""A step leaves nothing when it fails halfway."""

import time
from pathlib import Path

import pytest

from shim.criu import options
from shim.kernel import alarm
from shim.restore import steps
from tests.unit.restore.swaps import a_swap


def test_late_swap_leaves_no_mark_on_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the mark `start` would take the container for restored, and it would never run."""
    monkeypatch.setattr(steps, "SWAPPED", str(tmp_path))
    monkeypatch.setattr(options, "write", lambda _: None)
    swap = a_swap(tmp_path, time.monotonic() + 60)

    def rings(path: str, mode: str) -> None:
        Path(path).open(mode).close()
        assert (tmp_path / "abc").exists()
        raise alarm.TooLate

    monkeypatch.setattr(steps, "open", rings, raising=False)
    with pytest.raises(alarm.TooLate), swap.undo, swap.held:
        steps.start_runtime(swap)
    assert not (tmp_path / "abc").exists()
