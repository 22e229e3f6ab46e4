"""The look at all that captured processes have open is bounded, and ends when it is told to."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from shim.capture import opened
from shim.capture.belongings import Belongings
from shim.contract.errors import NotCapturable
from shim.kernel.stopping import Stop, Stopped

if TYPE_CHECKING:
    from shim.capture.source import Source

SOURCE = cast("Source", SimpleNamespace(container="c1", shm="", pid=os.getpid()))


def test_process_with_too_many_descriptors_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(opened.look(SOURCE, [os.getpid()], Stop())) > 5
    monkeypatch.setattr(opened, "MAX_OPENED", 5)
    with pytest.raises(NotCapturable, match="more than 5 descriptors"):
        opened.look(SOURCE, [os.getpid()], Stop())


def test_looks_at_processes_end_when_told() -> None:
    stop = Stop()
    stop.tell()
    with pytest.raises(Stopped):
        opened.look(SOURCE, [os.getpid()], stop)
    own = Belongings(SOURCE, stop)
    own.looked_at([os.getpid()])
    with pytest.raises(Stopped):
        own.early(os.stat("/"))


def test_work_of_the_frozen_window_has_its_deadline() -> None:
    stop = Stop(time.monotonic() + 60)
    late = stop.sooner(time.monotonic() - 1, "the window is over")
    with late, pytest.raises(Stopped, match="the window is over"):
        stop.check()
    stop.check()
    with stop.sooner(time.monotonic() + 120, "later than its own"):
        assert stop.until < time.monotonic() + 61
