"""A capture that a person asked for leaves the container's state as it was, however it fails."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from shim.contract.errors import NotCapturable
from shim.daemon.captures import Captures
from shim.daemon.tracked import Pod, State, Tracked


@pytest.mark.parametrize("wrong", [KeyError("x"), NotCapturable("a", about="c", why="", do="")])
def test_state_is_as_before(wrong: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    tracked = Tracked(cast("Any", "c1"), "main", Pod("n", "p", "u", "s"), cast("Any", None))
    tracked.identity = cast("Any", object())
    tracked.become(State.COLD, "as it was")

    async def fails(_: Captures, tracked: Tracked, *__: object) -> None:
        tracked.become(State.CAPTURING)
        raise wrong

    monkeypatch.setattr(Captures, "_capture", fails)
    with pytest.raises(type(wrong)):
        asyncio.run(object.__new__(Captures).now(tracked))
    assert (tracked.state, tracked.reason, tracked.task) == (State.COLD, "as it was", None)
