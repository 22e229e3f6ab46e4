"""However a test run ends, its nodes go, and the next run finds nothing of them."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.node.inventory import HostInventory, take_host
from tests.node.node import Node

TOP = Path(__file__).parents[2]
RUN = """
import signal, sys, time
from pathlib import Path
from tests.node.node import Node
from tests.node.podspec import ContainerSpec

# A background job of a shell starts with SIGINT ignored, and hands that on.
signal.signal(signal.SIGINT, signal.default_int_handler)
with Node("forky") as node:
    node.start_containerd()
    node.import_image(Path(sys.argv[1]))
    sleeper = ContainerSpec("quickthaw.test/shell:1", args=["-c", "sleep 99"])
    node.kubelet.run_pod("stays", [sleeper])
    print("running", flush=True)
    if sys.argv[2] == "raises":
        raise SystemExit(3)
    time.sleep(60)
"""
GONE_WITHIN_S = 60.0


@dataclass(frozen=True)
class Ended:
    """An ended test run, and the objects that it had made."""

    pid: int
    status: int
    had: HostInventory


def run_and_end(archive: Path, how: str, number: int | None) -> Ended:
    """Runs a test with a pod, which ends by itself or by signal `number`."""
    command = [sys.executable, "-c", RUN, str(archive), how]
    with subprocess.Popen(command, cwd=TOP, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"running\n"
        had = take_host(run.pid)
        if number is not None:
            run.send_signal(number)
        run.communicate(timeout=60)
    return Ended(run.pid, run.returncode, had)


@pytest.mark.parametrize(("how", "number"), [("raises", None), ("is interrupted", signal.SIGINT)])
def test_failed_run_leaves_nothing(shell_archive: Path, how: str, number: int | None) -> None:
    ended = run_and_end(shell_archive, how, number)
    assert ended.status != 0
    after = take_host(ended.pid)
    assert (after.processes, after.cgroups, after.runs) == ((), (), ())
    assert after.mounts == ended.had.mounts


def test_killed_run_takes_its_processes_along(shell_archive: Path) -> None:
    ended = run_and_end(shell_archive, "is killed", signal.SIGKILL)
    assert ended.status == -signal.SIGKILL
    assert ended.had.processes
    deadline = time.monotonic() + GONE_WITHIN_S
    while take_host(ended.pid).processes:
        assert time.monotonic() < deadline, "processes of the killed run are still there"
        time.sleep(0.05)


def test_next_run_removes_the_left_overs_of_a_killed_run(shell_archive: Path) -> None:
    ended = run_and_end(shell_archive, "is killed", signal.SIGKILL)
    assert ended.had.runs
    with Node("forky"):
        after = take_host(ended.pid)
    assert (after.processes, after.cgroups, after.runs) == ((), (), ())
    assert take_host(os.getpid()).mounts == ended.had.mounts
