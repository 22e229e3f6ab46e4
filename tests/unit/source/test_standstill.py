"""Stopped and traced processes are found before the freeze, and a held program is ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from shim.capture.dump import frozen_s
from shim.kernel import lineage, procfs
from shim.node import tool
from shim.source import standstill

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SOON_S = 10.0


@contextlib.contextmanager
def sleeping() -> Iterator[int]:
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def test_stopped_process_is_named() -> None:
    with sleeping() as pid, sleeping() as other:
        assert standstill.obstacles([pid, other]) == []
        os.kill(pid, signal.SIGSTOP)
        until = time.monotonic() + SOON_S
        while procfs.state(pid) != "T" and time.monotonic() < until:
            time.sleep(0.01)
        assert standstill.obstacles([other, pid]) == [f"process {pid} (sleep) is stopped"]
        os.kill(pid, signal.SIGCONT)


def fake(proc: Path, pid: int, thread: int, **fields: str) -> None:
    rows = {"Name": "worker", "State": "S (sleeping)", "TracerPid": "0", "NSpid": f"{pid}\t7"}
    directory = proc / str(pid) / "task" / str(thread)
    directory.mkdir(parents=True)
    text = "".join(f"{name}:\t{value}\n" for name, value in (rows | fields).items())
    (directory / "status").write_bytes(os.fsencode(text))


def test_traced_thread_is_named_with_its_process(tmp_path: Path) -> None:
    fake(tmp_path, 40, 40)
    fake(tmp_path, 40, 41, TracerPid="99", State="t (tracing stop)")
    fake(tmp_path, 50, 50)
    found = standstill.obstacles([40, 50, 60], str(tmp_path))
    assert found == ["process 7 (worker) is traced by process 99 of the node"]


def test_name_that_is_not_text_is_reported(tmp_path: Path) -> None:
    fake(tmp_path, 40, 40, State="T (stopped)", Name=os.fsdecode(b"\xff\xfe"))
    found = standstill.obstacles([40], str(tmp_path))
    assert found == ["process 7 (\\xff\\xfe) is stopped"]


@pytest.mark.parametrize(
    ("gib", "limit_s", "expected"), [(0, 30, 10), (1, 30, 12), (100, 30, 30), (100, 500, 210)]
)
def test_frozen_window_is_limited(gib: int, limit_s: float, expected: float) -> None:
    assert frozen_s(gib << 30, limit_s) == expected


GRANDCHILD = """
import subprocess, time
child = subprocess.Popen(["sleep", "60"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""


def test_late_program_is_killed_with_all_its_descendants(tmp_path: Path) -> None:
    path = tmp_path / "child"
    code = GRANDCHILD.replace("print(child.pid", f"open({str(path)!r}, 'w').write(str(child.pid)")
    code = code.replace(", flush=True)", ")")
    with pytest.raises(TimeoutError, match="did not end within"):
        tool.run([sys.executable, "-ISc", code], within_s=2)
    child = int(path.read_text())
    until = time.monotonic() + SOON_S
    with contextlib.suppress(FileNotFoundError):
        while procfs.state(child) != "Z" and time.monotonic() < until:
            time.sleep(0.01)
        assert procfs.state(child) == "Z"


def test_program_that_waits_in_the_kernel_is_released_and_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Like CRIU before a frozen process: here nothing ends before the call of `release`."""
    released: list[float] = []
    monkeypatch.setattr(tool, "_has_ended", lambda _: len(released) > 2)
    with pytest.raises(TimeoutError):
        tool.run(["sleep", "60"], within_s=0.1, release=lambda: released.append(time.monotonic()))
    assert len(released) > 2


def test_program_that_does_not_die_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test reaps the program, because only the look is wrong."""
    monkeypatch.setattr(tool, "_DIES_WITHIN_S", 0.1)
    monkeypatch.setattr(tool, "_has_ended", lambda _: False)
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def noted(*arguments: Any, **more: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **more))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", noted)
    with pytest.raises(TimeoutError, match="did not die of SIGKILL: process"):
        tool.run(["sleep", "60"], within_s=0)
    started[0].wait(SOON_S)


def test_descendants_are_found_over_sessions() -> None:
    with subprocess.Popen(
        [sys.executable, "-ISc", GRANDCHILD], stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout
        child = int(process.stdout.readline())
        assert lineage.descendants(process.pid) == [child]
        assert process.pid in lineage.descendants(os.getpid())
        os.kill(child, signal.SIGKILL)
        process.kill()
