"""Records changes on the host for a container, each before the change is made.

A process that is killed with kill -9 leaves this trace: `quickthaw-hook poststop` and the daemon
undo the changes in it. A line without its change costs one look; a change without its line would be
a leak. Lean: the swap path imports this module.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os

from shim.contract import jsontext
from shim.contract.paths import (
    CONTAINER_CHECKPOINT_LOCK,
    CONTAINER_JOURNAL,
    CONTAINER_SWAP_LOCK,
    CONTAINER_THAW_LOCK,
    CONTAINERS,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_MAX_BYTES = 16 << 20
THAW, CHECKPOINT = CONTAINER_THAW_LOCK, CONTAINER_CHECKPOINT_LOCK

ROOTFS, SHM, ADDRESS, DONE = "rootfs", "shm", "address", "done"
"""Kinds of change. DONE: the swap is complete, its changes belong to the container now."""
NETNS = "netns"
"""Names the network namespace of the ADDRESS lines: its identity, as of `shim.kernel.netns`."""
SHM_PLACED = "shm-placed"
"""From this line on, the files that a line SHM lists may have their names in the pod's /dev/shm."""
SHM_UNDONE = "shm-undone"
"""The files that a line SHM lists were removed: a file with such a name is somebody else's now."""
RUNTIME = "runtime"
"""A restore began; the runtime keeps the container's state in this directory."""
GPU = "gpu"
"""The capture of a running container locks or checkpoints these CUDA processes, each by its pid and
when it started; none when all run again."""
FROZEN = "frozen"
"""The capture of a running container froze the cgroup with this path."""


def path_of(container: str) -> str:
    """Returns the path of the journal of `container`."""
    return f"{CONTAINERS}/{container}/{CONTAINER_JOURNAL}"


@contextlib.contextmanager
def lock(directory: str, name: str = CONTAINER_SWAP_LOCK) -> Iterator[int]:
    """Lock the container's directory while a swap is under way. Yields the lock's descriptor.

    A runtime that cleans up after a failed restore runs our poststop hook, which must leave alone
    everything that the following cold start needs. The kernel drops the lock when the last process
    with the descriptor has ended. Raises BlockingIOError when another process holds the lock,
    OSError.
    """
    fd = os.open(f"{directory}/{name}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield fd
    finally:
        os.close(fd)


def is_locked(directory: str, name: str = CONTAINER_SWAP_LOCK) -> bool:
    """Whether a swap (or the work that `name` stands for) locks this container's directory."""
    try:
        with lock(directory, name):
            return False
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False


def note(path: str, kind: str, subject: object) -> None:
    """Append an intended change. Raises OSError.

    Does not sync the file: a reboot ends both the change and the journal.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    try:
        line = jsontext.compose([kind, subject]).encode() + b"\n"
        written = os.write(fd, line)
        if written < len(line):
            # The disk is full. The next line must not become a part of this line.
            os.ftruncate(fd, os.fstat(fd).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    finally:
        os.close(fd)


def changes(path: str) -> Iterator[tuple[str, object]]:
    """Yields the changes, last first. Skips a torn last line (kill -9 during the write).

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
