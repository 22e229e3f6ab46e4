"""Work that a capture waits for goes to its end, however often the capture is cancelled
meanwhile.
"""

import asyncio
import logging

import pytest

from shim.capture.sequence import finished


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
