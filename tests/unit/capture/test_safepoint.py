"""A CRIU that must be killed is stopped where no process executes its code."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shim.capture import safepoint
from shim.node import tool

BLOCKED = "fffffffffffbfeef"
"""SigBlk of a process that executes a system call for CRIU 4.1 or 4.2."""
WORKLOADS = "fffffffffffbfeff"
"""A workload that blocks all signals, SIGTRAP with them."""
TREE = "import subprocess, sys; subprocess.run(['sleep', '100'])"


@pytest.mark.parametrize(
    ("state", "blocked", "is_safe"),
    [
        ("t (tracing stop)", BLOCKED, False),
        ("R (running)", BLOCKED, False),
        ("S (sleeping)", BLOCKED, True),  # the daemon of CRIU's blob, which leaves by itself
        ("t (tracing stop)", WORKLOADS, True),
        ("t (tracing stop)", "0000000000000000", True),
    ],
)
def test_thread_that_executes_crius_code_is_no_safe_point(
    tmp_path: Path, state: str, blocked: str, *, is_safe: bool
) -> None:
    for thread, (its, mask) in {"7": ("S (sleeping)", "0" * 16), "8": (state, blocked)}.items():
        directory = tmp_path / "7" / "task" / thread
        directory.mkdir(parents=True)
        text = f"Name:\tState: t\nState:\t{its}\nSigBlk:\t{mask}\nSigIgn:\t{BLOCKED}\n"
        (directory / "status").write_text(text)
    assert safepoint.is_safe([7], str(tmp_path)) == is_safe
    assert safepoint.is_safe([9], str(tmp_path)), "a process that has ended"


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture
def program() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", TREE])


def children(pid: int) -> list[int]:
    deadline = time.monotonic() + 20
    while not (text := Path(f"/proc/{pid}/task/{pid}/children").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return [int(each) for each in text.split()]


@pytest.mark.parametrize("after", [0, 3, 10**9])
def test_criu_goes_on_until_a_safe_point_and_stands_then(
    program: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """`after` looks; the last never comes, and CRIU is stopped all the same."""
    (criu,) = children(program.pid)
    looks = 0

    def is_safe(_: object) -> bool:
        nonlocal looks
        looks += 1
        assert state(criu) == "T", "it may not move while we look"
        return looks > after

    monkeypatch.setattr(safepoint, "is_safe", is_safe)
    try:
        assert safepoint.stop(program.pid, [os.getpid()]) == (after < 10**9)
        assert state(criu) == "T"
        assert state(program.pid) != "T", "the runtime goes on"
    finally:
        os.kill(criu, 9)
        program.wait()


def test_late_program_is_told_of_before_it_is_killed() -> None:
    told = []

    def before_kill(pid: int) -> None:
        told.append(state(pid))

    with pytest.raises(TimeoutError):
        tool.run(["sleep", "100"], within_s=0.1, before_kill=before_kill)
    assert told == ["S"]
