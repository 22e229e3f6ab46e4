"""What was changed on the host for one container, written before each change.

kill -9 leaves a trace: `quickthaw-hook poststop` and the daemon undo what is in it. A line
without its change costs one look; the reverse would be a leak. Lean: the swap path imports it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os

from shim.contract import jsontext
from shim.contract.paths import CONTAINER_JOURNAL, CONTAINERS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_MAX_BYTES = 16 << 20
_LOCK = "lock"
THAW = "thaw.lock"
"""Name of the lock of the guard that thaws what the daemon no longer can."""
CHECKPOINT = "checkpoint.lock"
"""Name of the lock that `runc checkpoint` itself holds: it outlives a daemon that is killed."""

ROOTFS, SHM, ADDRESS, DONE = "rootfs", "shm", "address", "done"
"""Kinds of change. DONE: the swap is complete, what it did belongs to the container now."""
NETNS = "netns"
"""Which network namespace the ADDRESS lines are about: its identity, as of `shim.kernel.netns`."""
SHM_PLACED = "shm-placed"
"""What a line SHM lists may have its names in the pod's /dev/shm from now on."""
SHM_UNDONE = "shm-undone"
"""What a line SHM lists was taken away again: what has its names is somebody else's."""
RUNTIME = "runtime"
"""A restore began; the runtime keeps the container's state in this directory."""
GPU = "gpu"
"""The capture of a running container locks or checkpoints these CUDA processes, each by its pid and
when it started; none when all run again."""
FROZEN = "frozen"
"""The capture of a running container froze the cgroup with this path."""


def path_of(container: str) -> str:
    """Where the journal of `container` is."""
    return f"{CONTAINERS}/{container}/{CONTAINER_JOURNAL}"


@contextlib.contextmanager
def lock(directory: str, name: str = _LOCK) -> Iterator[int]:
    """Hold the container's directory while a swap is under way; the lock's descriptor.

    A runtime that cleans up after a failed restore runs our poststop hook: it must not take
    away what the cold start that follows needs. The kernel drops the lock when the last process
    with the descriptor has ended. Raises BlockingIOError when it is held, OSError.
    """
    fd = os.open(f"{directory}/{name}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield fd
    finally:
        os.close(fd)


def is_locked(directory: str, name: str = _LOCK) -> bool:
    """Whether a swap (or what else `name` stands for) of this directory's container goes on."""
    try:
        with lock(directory, name):
            return False
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False


def note(path: str, kind: str, subject: object) -> None:
    """Append one intended change. Raises OSError.

    Not synced: what it describes is gone after a reboot, and so is the journal.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    try:
        line = jsontext.compose([kind, subject]).encode() + b"\n"
        written = os.write(fd, line)
        if written < len(line):
            # A full disk. The next line must not become a part of this one.
            os.ftruncate(fd, os.fstat(fd).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    finally:
        os.close(fd)


def changes(path: str) -> Iterator[tuple[str, object]]:
    """The changes, last first. A torn last line (kill -9 while writing) was not yet a change.

    Raises ValueError for a line that `note` cannot have written.
    """
    try:
        with open(path, "rb") as file:
            lines = file.read(_MAX_BYTES).split(b"\n")
    except FileNotFoundError:
        return
    for line in reversed(lines[:-1]):
        yield _change(line)


def _change(line: bytes) -> tuple[str, object]:
    entry = jsontext.parse(line)
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
        raise ValueError(f"a line of a journal that is no change: {line[:80]!r}")
    return entry[0], entry[1]
