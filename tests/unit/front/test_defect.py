"""An error that nobody expected is told, and blames the snapshot no more than what came before."""

from __future__ import annotations

import contextlib
import errno
import os

import pytest

from shim.contract.errors import Blame, ShmNotFilled, SwapFailed, blame_of
from shim.front import main
from shim.oci import call
from shim.restore import failure, logs

CALL = call.parse(["create", "--bundle", "/b", "c1"])


def _failing(first: Exception, then: Exception) -> Exception:
    def fails() -> None:
        raise then

    def undone() -> None:
        with contextlib.ExitStack() as undo:
            undo.callback(fails)
            raise first

    with pytest.raises(type(then)) as caught:
        undone()
    return caught.value


def _defect(found: Exception) -> SwapFailed:
    assert CALL
    return main._defect(CALL, found)


def test_undo_that_fails_does_not_change_whose_fault_it_was() -> None:
    first = ShmNotFilled("cannot fill", about="c1", why="f exists", do="")
    told = _defect(_failing(first, PermissionError(errno.EPERM, "no")))
    assert blame_of(told) == Blame.OTHER
    assert "PermissionError" in told.why
    assert "f exists" in told.why


def test_defect_blames_the_snapshot_but_for_what_the_node_lacks() -> None:
    assert blame_of(_defect(KeyError("x"))) == Blame.RESTORE
    assert blame_of(_defect(OSError(errno.ENOSPC, "full"))) == Blame.OTHER


def test_log_that_cannot_be_kept_does_not_hide_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]
) -> None:
    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(logs, "keep", full)

    class Ticket:
        container, snapshot = "c1", "a" * 64

    told = failure.of_criu(Ticket, {}, os.fspath(tmp_path), "Can't bind")  # type: ignore[arg-type]
    assert told.why == "Can't bind"
    assert "No space left" in told.do
