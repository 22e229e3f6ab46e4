"""Directories of running test nodes, and the removal of directories of ended runs.

Each run has build/node/runs/ID and holds a lock on the directory for as long as any process of the
run lives. A killed run holds no lock: the next run removes the directory and the cgroups of the
killed run.
"""

import contextlib
import fcntl
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.node import cgroups
from tests.node.base import BUILD, locked

RUNS = BUILD / "runs"
GONE_WITHIN_S = 30.0


@contextmanager
def run_directory(name: str) -> Iterator[Path]:
    """Makes a fresh directory RUNS/NAME-PID-RANDOM; removes it and its cgroups afterwards."""
    with locked(BUILD / "runs.lock"):
        sweep()
        RUNS.mkdir(exist_ok=True)
        path = Path(tempfile.mkdtemp(prefix=f"{name}{of_process(os.getpid())}", dir=RUNS))
        lock = _try_lock(path)
    try:
        yield path
    finally:
        with locked(BUILD / "runs.lock"):
            remove(path)
        if lock is not None:
            os.close(lock)


def of_process(pid: int) -> str:
    """Returns the part that is in the names of all runs of test process `pid`, and no other's."""
    return f"-{pid}-"


def sweep() -> None:
    """Remove the left-overs of killed runs."""
    for path in RUNS.glob("*"):
        lock = _try_lock(path)
        if lock is not None:
            remove(path)
            os.close(lock)


def remove(path: Path) -> None:
    """Remove a run: its processes, of which a run that ended in order has none, cgroups, files.

    Raises TimeoutError when a process cannot be killed.
    """
    deadline = time.monotonic() + GONE_WITHIN_S
    while pids := cgroups.processes(path.name):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path.name}: processes {pids} do not die")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                _kill(pid)
    for cgroup in cgroups.of_node(path.name):
        cgroups.remove(cgroup)
    shutil.rmtree(path)


def _try_lock(path: Path) -> int | None:
    """Returns a descriptor that holds the run's lock, or None while the run lives.

    No process inherits the descriptor: the node's processes die with the test run, which therefore
    is the run.
    """
    fd = os.open(path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _kill(pid: int) -> None:
    """Send SIGKILL, and wait for the end. Raises ProcessLookupError when there is no such
    process.
    """
    process_fd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(process_fd, signal.SIGKILL)
        select.select([process_fd], [], [], GONE_WITHIN_S)
    finally:
        os.close(process_fd)
