"""The look at all that captured processes have open is bounded, and ends when it is told to."""

from __future__ import annotations

import contextlib
import os
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from shim.contract.errors import NotCapturable
from shim.kernel.stopping import Stop, Stopped
from shim.oci.spec import Spec
from shim.source import opened
from shim.source.belongings import Belongings

if TYPE_CHECKING:
    from pathlib import Path

    from shim.source.source import Source

SOURCE = cast("Source", SimpleNamespace(container="c1", shm="", pid=os.getpid(), spec=Spec({})))


def test_process_with_too_many_descriptors_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not looked_at(__file__)
    monkeypatch.setattr(opened, "MAX_OPENED", 50)
    with open("/dev/null") as file, contextlib.ExitStack() as stack:
        for _ in range(50):
            stack.callback(os.close, os.dup(file.fileno()))
        with pytest.raises(NotCapturable, match="more than 50 descriptors"):
            looked_at()


def looked_at(*names: str, volume: str = "/none") -> list[str]:
    """Those of the names that are among what this process has open."""
    spec = Spec({"mounts": [{"destination": volume, "type": "bind", "source": "/v"}]})
    source = cast("Source", SimpleNamespace(container="c1", spec=spec))
    found = {each.name for each in opened.look(source, [os.getpid()], Stop())}
    return [name for name in names if name in found]


def test_what_is_common_is_left_out(tmp_path: Path) -> None:
    gone, kept = f"{tmp_path}/gone", f"{tmp_path}/kept"
    with open(gone, "w"), open(kept, "w"), open("/dev/null"):
        os.unlink(gone)
        names = (f"{gone} (deleted)", kept, "/dev/null")
        assert looked_at(*names) == [f"{gone} (deleted)", "/dev/null"]
        assert looked_at(*names, volume=str(tmp_path)) == [*names]
    ends = os.pipe()
    assert not looked_at(os.readlink(f"/proc/self/fd/{ends[0]}"))
    for each in ends:
        os.close(each)


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
