"""Holds a process by a pidfd, which tells whether the pid still is that process's. Lean.

The kernel gives the pid of an ended process to a new process. A later look at `/proc/PID`, or a
later entry into a namespace by that path, may meet a process of another pod or of the node. A pidfd
tells whether the process still exists: as long as it does, the pid is its own. Sources:
pidfd_open(2), namespaces(7).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal

from shim.kernel import survivors
from shim.kernel.fds import OwnedFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self


class Held:
    """Holds the first process of a container, and its network namespace. `close` must follow."""

    __slots__ = ("_network", "_pidfd", "pid")

    def __init__(self, pid: int, container: str) -> None:
        """Raises OSError; ProcessLookupError unless `pid` is a living process of the container."""
        with contextlib.ExitStack() as undo:
            self.pid, self._pidfd = pid, undo.enter_context(OwnedFd(os.pidfd_open(pid)))
            if not survivors.is_member(pid, container):
                raise ProcessLookupError(f"process {pid} is none of container {container}")
            self._network = undo.enter_context(self.open("ns/net"))
            undo.pop_all()

    def open(self, name: str, flags: int = os.O_RDONLY) -> OwnedFd:
        """Open /proc/PID/`name` of this process and of no other. Raises OSError."""
        with contextlib.ExitStack() as undo:
            found = OwnedFd(os.open(f"/proc/{self.pid}/{name}", flags | os.O_CLOEXEC))
            undo.enter_context(found)
            if not is_alive(self._pidfd.fileno()):
                raise ProcessLookupError(f"process {self.pid} has ended")
            undo.pop_all()
        return found

    def network_fd(self) -> int:
        """Returns the network namespace, also after the process's end. ValueError after `close`."""
        return self._network.fileno()

    def close(self) -> None:
        """Release the process and the namespace, which may go now. A second call does nothing."""
        self._pidfd.close()
        self._network.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_alive(pidfd: int) -> bool:
    """Whether the process still exists: a pidfd is readable when its process has ended."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return not poll.poll(0)


def kill_parent(parent: int) -> None:
    """Send SIGKILL to the process `parent`, if it still is the parent of this process."""
    with contextlib.suppress(ProcessLookupError), OwnedFd(os.pidfd_open(parent)) as pidfd:
        if os.getppid() == parent:  # after the pidfd: the pid was not reused in between
            signal.pidfd_send_signal(pidfd.fileno(), signal.SIGKILL)
