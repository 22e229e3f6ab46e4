"""Turns of restores, with processes, as on a node."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.contract.errors import NoTurn
from shim.kernel import alarm
from shim.restore import turns

ROOT = Path(__file__).parents[3]
WORK = """
import sys, time
sys.path.insert(0, {root!r})
from shim.contract.errors import NoTurn
from shim.kernel import alarm
from shim.restore import turns
try:
    with turns.taken({most}, until=time.monotonic() + {wait}, directory={directory!r}):
        print("in", flush=True)
        sys.stdin.readline()
    print("out", flush=True)
except NoTurn as error:
    print("no turn:", error, flush=True)
"""
SOON_S = 20.0


class Restore:
    """A process that asks for a turn and keeps the turn until it gets the order to end."""

    def __init__(self, directory: Path, most: int, wait: float = SOON_S) -> None:
        code = WORK.format(root=str(ROOT), most=most, wait=wait, directory=str(directory))
        before = set(directory.glob("[0-9]*"))
        self.process = subprocess.Popen(
            [sys.executable, "-ISE", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        wait_until(
            lambda: set(directory.glob("[0-9]*")) - before or self.process.poll() is not None
        )

    def says(self) -> str:
        """Waits for the process's next line and returns it."""
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.flush()


def wait_until(done: object) -> None:
    deadline = time.monotonic() + SOON_S
    while not done():  # type: ignore[operator]
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.002)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "turns").mkdir()
    return tmp_path / "turns"


@pytest.fixture
def started() -> Iterator[list[Restore]]:
    found: list[Restore] = []
    yield found
    for each in found:
        each.process.kill()
        each.process.communicate()


def said_so_far(restores: list[Restore]) -> list[int]:
    """Returns the processes that have something to say now."""
    import select

    poll = {each.process.stdout.fileno(): at for at, each in enumerate(restores)
            if each.process.stdout}  # fmt: skip
    ready, _, _ = select.select(list(poll), [], [], 0.25)
    return sorted(poll[fd] for fd in ready)


def test_restores_get_turns_in_the_order_of_arrival(
    directory: Path, started: list[Restore]
) -> None:
    started += [Restore(directory, most=2) for _ in range(7)]
    assert [started[0].says(), started[1].says()] == ["in", "in"]
    for number in range(2, 7):
        assert said_so_far(started[number - 2 :]) == [], "no more than two at once"
        started[number - 2].end()
        assert started[number - 2].says() == "out"
        assert started[number].says() == "in", "the longest waiting one is the next"
    for each in started:
        each.end()
        each.process.wait(SOON_S)
    assert list(directory.iterdir()) == []


def test_later_restores_do_not_starve_an_early_restore(
    directory: Path, started: list[Restore]
) -> None:
    started.append(Restore(directory, most=1))
    assert started[0].says() == "in"
    early = Restore(directory, most=1)
    started.append(early)
    started += [Restore(directory, most=1) for _ in range(5)]
    started[0].end()
    assert early.says() == "in"
    assert said_so_far(started[2:]) == []


def test_killed_restore_frees_its_turn(directory: Path, started: list[Restore]) -> None:
    started += [Restore(directory, most=1) for _ in range(3)]
    assert started[0].says() == "in"
    os.kill(started[1].process.pid, signal.SIGKILL)  # during the wait
    started[1].process.wait()
    os.kill(started[0].process.pid, signal.SIGKILL)  # during the restore
    assert started[2].says() == "in"
    started.append(Restore(directory, most=1))
    assert len(list(directory.glob("[0-9]*"))) == 2, "who arrives removes what the dead left"


def test_restore_that_waits_too_long_gets_no_turn_and_leaves_the_queue(
    directory: Path, started: list[Restore]
) -> None:
    started.append(Restore(directory, most=1))
    assert started[0].says() == "in"
    began = time.monotonic()
    started.append(Restore(directory, most=1, wait=0.4))
    started.append(Restore(directory, most=1))
    assert started[1].says().startswith("no turn: restore queue timed out")
    assert 0.3 < time.monotonic() - began < 5
    started[0].end()
    assert started[2].says() == "in"


def test_blocked_queue_delays_no_restore_for_ever(directory: Path) -> None:
    holder = subprocess.Popen(["flock", str(directory), "sleep", "1000"], start_new_session=True)
    try:
        lock = os.open(directory, os.O_RDONLY)
        wait_until(lambda: turns._is_locked(str(directory)))
        os.close(lock)
        began = time.monotonic()
        with (
            pytest.raises(NoTurn, match="holds the queue"),
            turns.taken(8, until=began + 0.2, directory=str(directory)),
        ):
            pass
        assert time.monotonic() - began < 2
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.wait()


def test_free_turn_costs_next_to_nothing(directory: Path) -> None:
    took = []
    for _ in range(50):
        began = time.perf_counter()
        with turns.taken(8, until=time.monotonic() + 1, directory=str(directory)):
            took.append(time.perf_counter() - began)
    assert min(took) < 0.002
    assert list(directory.iterdir()) == []


def test_missing_directory_of_turns_is_made(tmp_path: Path) -> None:
    with turns.taken(1, until=time.monotonic() + 1, directory=str(tmp_path / "turns")):
        assert (tmp_path / "turns" / "1").exists()


def test_deadline_in_the_middle_of_an_arrival_leaves_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def slow(*names: str) -> None:
        time.sleep(0.1)  # the alarm rings here
        rename(*names)

    monkeypatch.setattr(os, "rename", slow)
    until = time.monotonic() + 0.05
    with (
        pytest.raises(alarm.TooLate),
        alarm.raising(until),
        turns.taken(1, until=until + 10, directory=str(directory)),
    ):
        pass
    assert list(directory.iterdir()) == []
