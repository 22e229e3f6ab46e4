"""The guard of a frozen container: the guard thaws when, and only when, the daemon cannot."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hook.thaw import ABANDONED
from shim.contract import journal
from shim.contract.words import GUARD_DONE, GUARD_READY, GUARD_WITHIN
from shim.source import guard as guarding

ROOT = Path(__file__).parents[3]
LONG_S = 60.0


@pytest.fixture
def freezer(tmp_path: Path) -> Path:
    """Returns a directory that looks like a frozen cgroup, with our files about its container."""
    (tmp_path / "abc").mkdir()
    (tmp_path / "cgroup").mkdir()
    (tmp_path / "cgroup" / "freezer.state").write_text("FROZEN")
    return tmp_path / "cgroup"


@contextmanager
def guard(freezer: Path, within_s: float) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a guard of container `abc` and waits until it is ready."""
    code = "import sys; from hook import thaw; thaw.CONTAINERS = sys.argv[1];"
    code += "sys.exit(thaw.thaw('abc', sys.argv[2], float(sys.argv[3])))"
    argv = [sys.executable, "-c", code, str(freezer.parent), str(freezer), str(within_s)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout
        assert process.stdout.readline() == GUARD_READY
        try:
            yield process
        finally:
            process.kill()


def test_guard_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = tmp_path / "hook"
    hook.write_text("#!/bin/sh\necho ready\nexec sleep 60\n")
    hook.chmod(0o755)
    monkeypatch.setattr(guarding, "HOOK", str(hook))
    monkeypatch.setattr(guarding, "_ENDS_WITHIN_S", 0.1)
    with guarding.guarded("abc", str(tmp_path), time.monotonic() + 60) as made:
        assert made.dismiss()


def test_guard_that_has_ended_lets_nobody_freeze(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = tmp_path / "hook"
    hook.write_text("#!/bin/sh\necho ready\n")
    hook.chmod(0o755)
    monkeypatch.setattr(guarding, "HOOK", str(hook))
    with guarding.guarded("abc", str(tmp_path), time.monotonic() + 60) as made:
        made._process.wait(10)
        with pytest.raises(OSError, match=r"has ended|Broken pipe"):
            made.limit(time.monotonic() + 60)


def state(freezer: Path) -> str:
    return (freezer / "freezer.state").read_text()


def test_dismissed_guard_touches_nothing(freezer: Path) -> None:
    with guard(freezer, LONG_S) as process:
        process.communicate(GUARD_DONE, timeout=10)
        assert (process.returncode, state(freezer)) == (0, "FROZEN")


def test_guard_thaws_when_the_daemon_ends(freezer: Path) -> None:
    with guard(freezer, LONG_S) as process:
        process.communicate(timeout=10)
        assert (process.returncode, state(freezer)) == (ABANDONED, "THAWED")


def test_guard_thaws_when_the_time_is_up(freezer: Path) -> None:
    with guard(freezer, 0.1) as process:
        assert process.wait(10) == ABANDONED
        assert state(freezer) == "THAWED"


def test_guard_takes_another_time(freezer: Path) -> None:
    with guard(freezer, LONG_S) as process:
        assert process.stdin
        process.stdin.write(GUARD_WITHIN + b"0.100\n")
        process.stdin.flush()
        assert process.wait(10) == ABANDONED
        assert state(freezer) == "THAWED"
    (freezer / "freezer.state").write_text("FROZEN")
    with guard(freezer, 0.5) as process:
        process.communicate(GUARD_WITHIN + b"60.000\n" + GUARD_DONE, timeout=10)
        assert (process.returncode, state(freezer)) == (0, "FROZEN")


def test_guard_waits_for_a_checkpoint_that_goes_on(freezer: Path) -> None:
    private = str(freezer.parent / "abc")
    with guard(freezer, LONG_S) as process:
        with journal.lock(private, journal.CHECKPOINT):
            assert process.stdin
            process.stdin.close()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.6)
            assert state(freezer) == "FROZEN"
            assert journal.is_locked(private, journal.THAW), "no other capture may begin"
        assert process.wait(10) == ABANDONED
        assert state(freezer) == "THAWED"
