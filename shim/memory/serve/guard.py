"""Guards a page server: holds copies of its userfaultfds, and ends the container if it dies.

When the last descriptor of a userfaultfd is closed, the kernel makes the areas ordinary: missing
pages read as zeros, and the container would go on with wrong memory. So a second process holds
every descriptor, and when the server dies or stalls, the guard kills the container first. Lean.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time

from shim.contract import faults, outcome
from shim.contract.errors import MemoryLost
from shim.contract.paths import CONTAINER_FILLING, CONTAINERS
from shim.kernel import held, perfevent, priority, process, survivors
from shim.memory.serve import child, messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap
    from collections.abc import Sequence

    from shim.contract.ticket import Ticket

TICK_S = 1.0
_STALLED_TICKS = 5
"""A server that has not moved in this many ticks of the guard's own clock counts as stalled: ticks,
so that a machine which stood still as a whole is not taken for a server that stands still."""
_DIES_WITHIN_S = 10.0


class Guard:
    """The server's side: starts the guard process, and moves the pulse that the guard watches."""

    def __init__(
        self,
        ticket: Ticket,
        pulse: mmap.mmap,
        not_its: Sequence[int] = (),
        servers: Sequence[int] = (),
    ) -> None:
        """not_its, servers: descriptors that the guard must not hold. The server keeps `servers`
        open, and closes `not_its` itself."""
        self._ticket, self._pulse, self._servers = ticket, pulse, servers
        self._fds: list[int] = []
        self._pid, self._socket = _started(ticket, pulse, (*not_its, *servers))

    def fileno(self) -> int:
        """Returns a descriptor that is readable when the guard has ended."""
        return self._socket.fileno()

    def beat(self) -> None:
        """Show the guard that the server moves."""
        self._pulse[0] = (self._pulse[0] + 1) & 0xFF

    def keep(self, fd: int) -> None:
        """Have the guard hold a copy of a userfaultfd, too. The caller keeps the descriptor."""
        self._fds.append(fd)
        with contextlib.suppress(OSError):  # the guard has ended: `renew` passes all of them on
            socket.send_fds(self._socket, [messages.HOLD], [fd])

    def renew(self) -> int:
        """Start another guard: the last was killed. Returns its descriptor. Raises OSError."""
        self._socket.close()
        os.waitpid(self._pid, 0)
        self._pid, self._socket = _started(self._ticket, self._pulse, self._servers)
        fds, self._fds = self._fds, []
        for fd in fds:
            self.keep(fd)
        return self._socket.fileno()

    def filled(self) -> None:
        """Tell the guard that nothing is missing: from now on the container survives the server."""
        with contextlib.suppress(OSError):
            self._socket.send(messages.COMPLETE)

    def dismiss(self) -> None:
        """End the guard: all is filled, or no container is left to be filled."""
        with contextlib.suppress(OSError):
            self._socket.send(messages.DISMISSED)
        self._socket.close()
        # While a stopped guard holds the descriptors, a page fault would wait for ever: kill the
        # guard.
        if not process.ends(self._pid, time.monotonic() + TICK_S):
            os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


def _started(ticket: Ticket, pulse: mmap.mmap, not_its: Sequence[int]) -> tuple[int, socket.socket]:
    server = os.getpid()

    def watch(its: socket.socket) -> None:
        for fd in not_its:
            os.close(fd)
        faults.disarm()
        priority.protect("quickthaw-guard")
        with contextlib.suppress(OSError):
            perfevent.hold()  # open until we end: CRIU does not wait for its first perf event
        _watch(ticket, its, pulse, server)

    return child.started(watch)


def _watch(ticket: Ticket, its: socket.socket, pulse: mmap.mmap, server: int) -> None:
    """Run the guard. Returns when the server is done; else ends the container and the server."""
    kept: list[int] = []
    last, stalled, is_filled = pulse[0], 0, False
    why = ""
    while not why:
        if not select.select([its], [], [], TICK_S)[0]:
            stalled = 0 if pulse[0] != last else stalled + 1
            last = pulse[0]
            if stalled >= _STALLED_TICKS:
                why = "the page server did not move any more"
            continue
        data, fds, _, _ = socket.recv_fds(its, 1, 4)
        kept += fds
        is_filled = is_filled or data == messages.COMPLETE
        if data == messages.DISMISSED:
            return
        if not data:
            why = "the page server was killed"
    if is_filled:
        forget(ticket.container)
    else:
        end(ticket, why)
    held.kill_parent(server)


def remember(container: str) -> None:
    """Mark the container as being filled, so that nobody captures it. Raises OSError."""
    os.close(os.open(_mark(container), os.O_WRONLY | os.O_CREAT, 0o600))


def forget(container: str) -> None:
    """Remove the mark: the container may be captured now."""
    with contextlib.suppress(OSError):
        os.unlink(_mark(container))


def _mark(container: str) -> str:
    return f"{CONTAINERS}/{container}/{CONTAINER_FILLING}"


def end(ticket: Ticket, why: str, *, blame: str = "") -> None:
    """Kill the container and report why: its memory cannot be completed. Never raises.

    blame: a word of Blame. A container that has ended by itself is not reported.
    """
    with contextlib.suppress(OSError):
        if not survivors.members(ticket.container):
            return  # the container ended before, and not because of us
        survivors.kill(ticket.container, until=time.monotonic() + _DIES_WITHIN_S)
    error = MemoryLost(
        "the memory could not be completed", about=ticket.container, why=why,
        do="Was the node out of memory, or the snapshot's disk away? See the kernel's log.",
    )  # fmt: skip
    with contextlib.suppress(OSError):
        outcome.write_killed(ticket, error, blame=blame)
