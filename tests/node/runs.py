"""Directories of test nodes that run, and what to do about those that no longer do.

Each run has build/node/runs/ID and holds a lock on it for as long as any process of it lives. A
run that was killed holds no lock: the next one removes its directory and its cgroups.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.node import cgroups
from tests.node.base import BUILD, locked

RUNS = BUILD / "runs"


@contextmanager
def run_directory(name: str) -> Iterator[Path]:
    """A fresh directory RUNS/NAME-PID-RANDOM, gone afterwards with the cgroups of its name."""
    with locked(BUILD / "runs.lock"):
        sweep()
        RUNS.mkdir(exist_ok=True)
        path = Path(tempfile.mkdtemp(prefix=f"{name}{of_this_process()}", dir=RUNS))
        lock = _try_lock(path)
    try:
        yield path
    finally:
        remove(path)
        if lock is not None:
            os.close(lock)


def of_this_process() -> str:
    """What the names of all runs of this process have, and of no other's."""
    return f"-{os.getpid()}-"


def sweep() -> None:
    """Remove what runs that were killed have left."""
    for path in RUNS.glob("*"):
        lock = _try_lock(path)
        if lock is not None:
            remove(path)
            os.close(lock)


def remove(path: Path) -> None:
    """Remove a run: its processes are gone, its cgroups and its files go."""
    for cgroup in cgroups.of_node(path.name):
        cgroups.remove(cgroup)
    shutil.rmtree(path)


def _try_lock(path: Path) -> int | None:
    """A descriptor that holds the run's lock, or None while the run lives.

    Inherited by no one: the node's processes die with the test run, which therefore is the run.
    """
    fd = os.open(path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def kill_stragglers(path: Path) -> None:
    """Kill what is left in the cgroups of a run. Only a run that was killed half-way has any."""
    for cgroup in cgroups.of_node(path.name):
        for directory, _, _ in os.walk(cgroup):
            for pid in (Path(directory) / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
