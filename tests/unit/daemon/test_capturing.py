"""A capture gives way to `exec`, and each way in which it ends has its own error."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from shim.contract.errors import CaptureFailed, ContainerBusy, GpuLost, QuickthawError
from shim.daemon import capturing
from shim.daemon.capturing import Capturing
from shim.daemon.tracked import Pod, Tracked
from shim.kernel.stopping import Stopped

BUSY = ContainerBusy("cannot capture now", about="c1", why="exec", do="")
LOST = GpuLost("the GPU is lost", about="c1", why="", do="")


class Scripted(Capturing):
    """Ends each attempt as `ends` says; an exception is raised, a number is waited for."""

    def __init__(self, *ends: BaseException | float | str) -> None:
        self._config = cast("Any", SimpleNamespace(capture_timeout_s=0.2))
        self.ends = list(ends)

    async def _once(self, *_: object) -> Any:
        end = self.ends.pop(0)
        if isinstance(end, BaseException):
            raise end
        if isinstance(end, float):
            await asyncio.sleep(end)
        return end, {}


def run(scripted: Scripted) -> Any:
    tracked = Tracked(cast("Any", "c1"), "main", Pod("n", "p", "u", "s"), cast("Any", None))
    return asyncio.run(scripted.run(tracked, cast("Any", None), cast("Any", None)))


def test_capture_is_retried_while_a_process_of_exec_is_in_the_container(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(capturing, "_BUSY_S", 0.001)
    assert run(Scripted(BUSY, BUSY, "done")) == ("done", {})
    busy = Scripted(*[BUSY] * (capturing._BUSY_TRIES + 1))
    with pytest.raises(ContainerBusy):
        run(busy)
    assert busy.ends == []


@pytest.mark.parametrize(
    ("end", "expected", "why"),
    [
        (5.0, CaptureFailed, "longer than 0.2 s"),
        (OSError("no space"), CaptureFailed, "no space"),
        (Stopped("asked to"), CaptureFailed, "asked to"),
        (LOST, GpuLost, "the GPU is lost"),
    ],
)
def test_each_end_has_its_error(end: Any, expected: type[QuickthawError], why: str) -> None:
    with pytest.raises(expected, match=why):
        run(Scripted(end))


def test_cancelled_capture_names_the_lost_gpu_for_which_the_container_was_killed() -> None:
    plain, caused = asyncio.CancelledError(), asyncio.CancelledError()
    caused.__context__ = LOST
    with pytest.raises(asyncio.CancelledError):
        run(Scripted(plain))
    with pytest.raises(GpuLost):
        run(Scripted(caused))
