"""A log is watched by a program that a pod's author cannot make a burden."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from shim.contract.errors import NeverReady
from shim.contract.names import ContainerId
from shim.oci.spec import Spec
from shim.source.source import Source
from shim.workload import logregex, logwatch
from shim.workload.annotations import LogReady
from shim.workload.readiness import wait_until_ready

if TYPE_CHECKING:
    from pathlib import Path

STAMP = "2026-01-01T00:00:00.0Z stdout F "


def source_of(log: Path) -> Source:
    return Source(ContainerId("c1"), 1, "/b", Spec({}), ("runc",), str(log))


def waited(log: Path, pattern: str, *, within_s: float = 20) -> None:
    asyncio.run(wait_until_ready(source_of(log), LogReady(pattern), within_s=within_s))


def test_present_or_later_line_is_found(tmp_path: Path) -> None:
    log = tmp_path / "0.log"
    log.write_text(f"{STAMP}model big loaded\n")
    waited(log, "^model [a-z]+ loaded$")

    async def comes() -> None:
        waiting = asyncio.create_task(
            wait_until_ready(source_of(log), LogReady("ready"), within_s=20)
        )
        await asyncio.sleep(0.3)
        assert not waiting.done()
        with log.open("a") as file:
            file.write(f"{STAMP}read")
            file.flush()
            await asyncio.sleep(0.3)
            assert not waiting.done(), "half a line is no line"
            file.write("y\n")
        await waiting

    asyncio.run(comes())


def test_rotated_log_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    path.write_text(f"{STAMP}one\n")
    log = logwatch.Log(str(path))
    assert list(log.new_lines()) == ["one"]
    path.rename(tmp_path / "0.log.1")
    assert list(log.new_lines()) == []
    path.write_text(f"{STAMP}two\n{STAMP}three\n")
    assert list(log.new_lines()) == ["two", "three"]


def test_slow_expression_blocks_nobody_and_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon's loop goes on meanwhile, and the author learns the expression."""
    slow = logregex.checked("a*a*a*b")
    log = tmp_path / "0.log"
    log.write_text(STAMP + "a" * 4000 + "\n")
    limited = tmp_path / "logwatch.py"
    with open(logwatch.__file__) as file:
        limited.write_text(file.read().replace("CPU_S = 60", "CPU_S = 1"))
    monkeypatch.setattr(logwatch, "__file__", str(limited))

    async def ticked() -> float:
        began, worst = time.monotonic(), 0.0
        waiting = asyncio.create_task(
            wait_until_ready(source_of(log), LogReady(slow), within_s=100)
        )
        while not waiting.done():
            before = time.monotonic()
            await asyncio.sleep(0.01)
            worst = max(worst, time.monotonic() - before)
        with pytest.raises(NeverReady, match="of the processor's time"):
            await waiting
        assert time.monotonic() - began < 60, "its time is limited"
        return worst

    assert asyncio.run(ticked()) < 1, "the event loop was held up"


def test_log_watcher_ends_with_a_killed_daemon(tmp_path: Path) -> None:
    log = tmp_path / "0.log"
    log.write_text("")
    start = (
        "import os, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-ISE', {logwatch.__file__!r}, "
        f"str(os.getpid()), 'never', {str(log)!r}])\n"
        "print(child.pid, flush=True)\nchild.wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE) as daemon:
        assert daemon.stdout is not None
        pidfd = os.pidfd_open(int(daemon.stdout.readline()))
        time.sleep(0.5)  # the watcher has asked to die with its parent: nothing reports that moment
        daemon.send_signal(signal.SIGKILL)
    asyncio.run(_ended(pidfd))
    os.close(pidfd)


async def _ended(pidfd: int) -> None:
    done = asyncio.Event()
    asyncio.get_running_loop().add_reader(pidfd, done.set)
    async with asyncio.timeout(10):
        await done.wait()
    asyncio.get_running_loop().remove_reader(pidfd)
