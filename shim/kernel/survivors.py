"""Finds and kills processes of a container that the runtime does not know, or not yet. Lean.

CRIU's new tree is in the container's cgroup from its first process on, and in no process group of
ours. When CRIU is killed, the processes that it has restored go on: they would hold the ports of
the pod against the cold start. `runc delete` does not help before the runtime has written its
state.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

from shim.kernel import procfs
from shim.kernel.fds import OwnedFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_POLL_S = 0.002
_ID_CHARS = 32
"""A shorter name might be part of another cgroup's name by chance. containerd's ids have 64."""


def kill(container: str, *, until: float) -> list[int]:
    """Send SIGKILL to every process in the container's cgroups, until none is left.

    Only for a container that the runtime has not created: everything in its cgroup is left from a
    restore. Returns the processes that are still there at `until` (on `time.monotonic`).
    """
    if len(container) < _ID_CHARS:
        return []
    while True:
        found = members(container)
        for pid in found:
            with contextlib.suppress(ProcessLookupError), OwnedFd(os.pidfd_open(pid)) as pidfd:
                if is_member(pid, container):  # the pid may have become another process's
                    signal.pidfd_send_signal(pidfd.fileno(), signal.SIGKILL)
        if not found or time.monotonic() > until:
            return found
        time.sleep(_POLL_S)


def members(container: str) -> list[int]:
    """Returns the living processes, without us, in cgroups with the container's name.

    By the name, because every driver (cgroupfs, systemd) has another path and the same name.
    """
    return list(newest_first(container))


def newest_first(container: str) -> Iterator[int]:
    """Yields `members` one by one, the highest pid first.

    So a caller that looks for a new process need not wait for a look at every process of the
    machine.
    """
    own = os.getpid()
    pids = sorted(procfs.pids(), reverse=True)
    return (pid for pid in pids if pid != own and _is_in(pid, container))


def is_member(pid: int, container: str) -> bool:
    """Whether the process lives in a cgroup that has the container's name in its path.

    A caller that must know that the process is still the same holds a pidfd.
    """
    return len(container) >= _ID_CHARS and _is_in(pid, container)


def numbered(container: str, pid: int) -> int:
    """Returns the process whose pid in the container is `pid`. Raises ProcessLookupError."""
    for found in members(container):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if procfs.numbers(found)[-1] == pid:
                return found
    raise ProcessLookupError(f"no process {pid} in {container}")


def _is_in(pid: int, name: str) -> bool:
    try:
        return any(
            name in path and is_named(path, name) for _, path in procfs.cgroups(pid)
        ) and procfs.state(pid) not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def is_named(path: str, name: str) -> bool:
    """Whether a part of the path is the id, or the name of a unit that ends with the id.

    A unit's name without systemd is `SLICE:PREFIX:ID`.
    """
    return any(
        part == name or part.endswith(f"-{name}.scope")
        for part in path.rpartition(":")[2].split("/")
    )
