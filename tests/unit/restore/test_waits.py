"""A late restore that waits for a file system is told from a restore that waits for itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from shim.contract.errors import Blame, SwapTooLate
from shim.oci.spec import Spec
from shim.restore import failure, waits
from tests.unit.restore.test_resume import TICKET

if TYPE_CHECKING:
    from pathlib import Path

OPENS = "import sys; open(sys.argv[1])"
OPENS_IN_A_THREAD = """
import sys, threading
threading.Thread(target=open, args=[sys.argv[1]]).start()
"""
SLEEPS = "import time; time.sleep(100)"
RUNS = "while True: pass"


def started(code: str, path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-ISE", "-c", code, str(path)])


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    """Returns a fifo without a writer: who opens it waits in the call."""
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def told(pid: int, *, within_s: float) -> str:
    until = time.monotonic() + within_s
    while not (found := waits.waiting([pid])) and time.monotonic() < until:
        time.sleep(0.01)
    return found


@pytest.mark.parametrize("code", [OPENS, OPENS_IN_A_THREAD])
def test_process_that_waits_in_a_call_on_files_is_found(fifo: Path, code: str) -> None:
    with started(code, fifo) as child:
        assert told(child.pid, within_s=20) == (
            f"process {child.pid} waits for a file system (openat)"
        )
        child.kill()
    assert waits.waiting([child.pid]) == "", "it has ended"


@pytest.mark.parametrize("code", [SLEEPS, RUNS])
def test_process_that_waits_for_something_else_is_not(fifo: Path, code: str) -> None:
    with started(code, fifo) as child:
        found = []
        for _ in range(50):  # it starts, and so reads files, at first
            found.append(waits.waiting([child.pid]))
            time.sleep(0.02)
        assert found[-1] == ""
        child.kill()


def test_descendants_of_the_swap_are_looked_at(fifo: Path) -> None:
    with started(OPENS, fifo) as child:
        told(child.pid, within_s=20)
        assert f"process {child.pid} " in waits.on_file_system("f" * 64)
        child.kill()


@pytest.mark.parametrize(("of_snapshot", "blame"), [(True, Blame.RESTORE), (False, Blame.OTHER)])
def test_only_a_step_that_depends_on_the_snapshot_alone_blames_it(
    of_snapshot: bool, blame: str
) -> None:
    error = failure.too_late(TICKET, Spec({}), "in step x", "why", of_snapshot=of_snapshot)
    assert isinstance(error, SwapTooLate)
    assert error.blame == blame
    assert "in step x" in str(error)


def test_late_restore_that_waits_for_a_volume_blames_nobody(fifo: Path) -> None:
    with started(OPENS, fifo) as child:
        told(child.pid, within_s=20)
        error = failure.too_late(
            TICKET, Spec({}), "in step criu", "no return before the deadline", of_snapshot=True
        )
        assert error.blame == Blame.OTHER
        assert f"process {child.pid} waits for a file system (openat)" in error.why
        child.kill()


@pytest.mark.parametrize(
    "reason",
    [
        "Error (criu/mount.c:1): mnt: Can't open /x: Stale file handle",
        "Error (criu/mount.c:1): mnt: Can't bind at /x: Transport endpoint is not connected",
        "Error (criu/files-reg.c:1): File x: Input/output error",
    ],
)
def test_volume_whose_server_is_gone_blames_nobody(reason: str) -> None:
    assert failure.is_of_the_pod(reason, [])
