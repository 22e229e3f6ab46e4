"""The guard of a page server: it has copies of all that the server has, and ends the container.

When the last descriptor of a userfaultfd is closed, the kernel makes the areas ordinary ones: what
was missing reads as zeros, and the container would go on with wrong memory. So a second process
holds every descriptor, and when the server dies or stalls it kills the container first. Lean.
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
from shim.memory import child

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap
    from collections.abc import Sequence

    from shim.contract.ticket import Ticket

TICK_S = 1.0
_STALLED_TICKS = 5
"""A server that has not moved in as many ticks of our own clock is given up: ticks, so that a
machine which stood still as a whole is not taken for a server that does."""
_DIES_WITHIN_S = 10.0
_KEEP, _FILLED, _DONE = b"+", b"=", b"."


class Guard:
    """The server's end: the guard process, and a pulse that it watches."""

    def __init__(self, ticket: Ticket, pulse: mmap.mmap, not_its: Sequence[int] = ()) -> None:
        """not_its: descriptors that it must not hold."""
        self._ticket, self._pulse = ticket, pulse
        self._fds: list[int] = []
        self._pid, self._socket = _started(ticket, pulse, not_its)

    def fileno(self) -> int:
        """Readable when the guard has ended."""
        return self._socket.fileno()

    def beat(self) -> None:
        """The server moves."""
        self._pulse[0] = (self._pulse[0] + 1) & 0xFF

    def keep(self, fd: int) -> None:
        """Have the guard hold a copy of a userfaultfd, too. The descriptor stays the caller's."""
        self._fds.append(fd)
        with contextlib.suppress(OSError):  # it has ended: `renew` passes on all of them
            socket.send_fds(self._socket, [_KEEP], [fd])

    def renew(self) -> int:
        """The guard was killed: have another one. Returns its descriptor. Raises OSError."""
        self._socket.close()
        os.waitpid(self._pid, 0)
        self._pid, self._socket = _started(self._ticket, self._pulse)
        fds, self._fds = self._fds, []
        for fd in fds:
            self.keep(fd)
        return self._socket.fileno()

    def filled(self) -> None:
        """Nothing is missing any more: whatever happens to the server, the container may go on."""
        with contextlib.suppress(OSError):
            self._socket.send(_FILLED)

    def dismiss(self) -> None:
        """All is filled, or there is nobody to be filled: the guard ends."""
        with contextlib.suppress(OSError):
            self._socket.send(_DONE)
        self._socket.close()
        # As long as it has the descriptors, a fault would wait for us: stopped, it is killed.
        if not process.ends(self._pid, time.monotonic() + TICK_S):
            os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


def _started(
    ticket: Ticket, pulse: mmap.mmap, not_its: Sequence[int] = ()
) -> tuple[int, socket.socket]:
    server = os.getpid()

    def watch(its: socket.socket) -> None:
        for fd in not_its:
            os.close(fd)
        faults.disarm()
        priority.protect("quickthaw-guard")
        with contextlib.suppress(OSError):
            perfevent.hold()  # open until we end: CRIU does not wait for its first one
        _watch(ticket, its, pulse, server)

    return child.started(watch)


def _watch(ticket: Ticket, its: socket.socket, pulse: mmap.mmap, server: int) -> None:
    """The guard's part. It returns only when the server is done or the container is dead."""
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
        is_filled = is_filled or data == _FILLED
        if data == _DONE:
            return
        if not data:
            why = "the page server was killed"
    if is_filled:
        forget(ticket.container)
    else:
        end(ticket, why)
    held.kill_parent(server)


def remember(container: str) -> None:
    """The container is being filled, and must not be captured. Raises OSError."""
    os.close(os.open(_mark(container), os.O_WRONLY | os.O_CREAT, 0o600))


def forget(container: str) -> None:
    """The container may be captured now."""
    with contextlib.suppress(OSError):
        os.unlink(_mark(container))


def _mark(container: str) -> str:
    return f"{CONTAINERS}/{container}/{CONTAINER_FILLING}"


def end(ticket: Ticket, why: str, *, blame: str = "") -> None:
    """Kill the container, and tell why: its memory cannot be completed. Never raises.

    blame: a word of Blame. A container that has ended by itself is not told of.
    """
    with contextlib.suppress(OSError):
        if not survivors.members(ticket.container):
            return  # it has ended already, and not because of us
        survivors.kill(ticket.container, until=time.monotonic() + _DIES_WITHIN_S)
    error = MemoryLost(
        "the memory could not be completed", container=ticket.container, why=why,
        do="Was the node out of memory, or the snapshot's disk away? See the kernel's log.",
    )  # fmt: skip
    with contextlib.suppress(OSError):
        outcome.write_killed(ticket, error, blame=blame)
