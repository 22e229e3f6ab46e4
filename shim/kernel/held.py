"""A process that stays the one that is meant, whatever becomes of its number. Lean.

The kernel gives the number of a process that has ended to the next one. Whoever looks at
`/proc/PID` later, or enters a namespace by that path, may meet a process of another pod or of the
node. A pidfd tells whether the process still exists: while it does, the number is its own. Sources:
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
    """The first process of a container, and its network namespace. `close` must follow."""

    __slots__ = ("_network", "_pidfd", "pid")

    def __init__(self, pid: int, container: str) -> None:
        """Raises OSError; ProcessLookupError when `pid` is no living process of the container."""
        with contextlib.ExitStack() as undo:
            self.pid, self._pidfd = pid, undo.enter_context(OwnedFd(os.pidfd_open(pid)))
            if not survivors.is_member(pid, container):
                raise ProcessLookupError(f"process {pid} is none of container {container}")
            self._network = undo.enter_context(self.open("ns/net"))
            undo.pop_all()

    def open(self, name: str, flags: int = os.O_RDONLY) -> OwnedFd:
        """Open /proc/PID/`name` of this process and no other. Raises OSError."""
        with contextlib.ExitStack() as undo:
            found = OwnedFd(os.open(f"/proc/{self.pid}/{name}", flags | os.O_CLOEXEC))
            undo.enter_context(found)
            if not is_alive(self._pidfd.fileno()):
                raise ProcessLookupError(f"process {self.pid} has ended")
            undo.pop_all()
        return found

    def network_fd(self) -> int:
        """Its network namespace, also when it has ended. Raises ValueError after `close`."""
        return self._network.fileno()

    def close(self) -> None:
        """Hold it no more: what it had may go. A second call does nothing."""
        self._pidfd.close()
        self._network.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_alive(pidfd: int) -> bool:
    """Whether the process has not ended: a pidfd is readable when it has."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return not poll.poll(0)


def kill_parent(parent: int) -> None:
    """SIGKILL to the process `parent`, if it still is the one that started this one."""
    with contextlib.suppress(ProcessLookupError), OwnedFd(os.pidfd_open(parent)) as pidfd:
        if os.getppid() == parent:  # after the pidfd: its number was not another's in between
            signal.pidfd_send_signal(pidfd.fileno(), signal.SIGKILL)
