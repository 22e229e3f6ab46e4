"""Work that a capture waits for goes to its end, however often the capture is cancelled
meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from shim.capture import sequence
from shim.capture.sequence import finished
from shim.contract.errors import CaptureFailed
from shim.criu.images import DamagedImage
from shim.kernel.stopping import Stop, Stopped

if TYPE_CHECKING:
    from pathlib import Path

    from shim.source.source import Source


async def fails_late(ended: list[str]) -> None:
    await asyncio.sleep(0.1)
    ended.append("work")
    raise ValueError("nobody hears it")


def test_work_cancelled_twice_is_awaited_and_its_outcome_dropped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ended: list[str] = []

    async def cancelled_twice() -> None:
        waiting = asyncio.create_task(finished(fails_late(ended)))
        for _ in range(2):
            await asyncio.sleep(0.01)
            waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert ended == ["work"], "the thread still uses what its caller is about to take away"

    with caplog.at_level(logging.ERROR, "asyncio"):
        asyncio.run(cancelled_twice(), debug=True)
    assert caplog.records == []


def test_work_without_cancellation_returns_its_outcome() -> None:
    with pytest.raises(ValueError, match="nobody hears it"):
        asyncio.run(finished(fails_late([])))


@pytest.mark.parametrize("wrong", [DamagedImage("cut"), OSError(5, "no disk"), Stopped("late")])
def test_what_fails_after_the_thaw_is_a_failed_capture(
    wrong: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*_: object) -> None:
        raise wrong

    async def room() -> None: ...

    source = SimpleNamespace(container="c1", check=lambda: None, gpus=())
    monkeypatch.setattr(sequence, "_before", lambda _: None)
    monkeypatch.setattr(sequence, "dump", lambda *_: None)
    monkeypatch.setattr(sequence, "_described", fails)
    with pytest.raises(CaptureFailed, match=str(wrong.args[-1])):
        asyncio.run(
            sequence.capture(
                cast("Source", source), tmp_path, {}, quiesce=None, resume=None, check_room=room,
                bounds=sequence.Bounds(Stop(), 1.0),
            )
        )  # fmt: skip
