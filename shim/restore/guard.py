"""Cleans up after a `quickthaw-runc` that was killed or stopped during its swap. Lean.

The guard is a fork of `quickthaw-runc` that waits until its parent is done with the swap. If the
parent ends before that, or is not done long after the deadline, nobody else would end the restored
processes: they would go on in the pod's network, in the way of the next attempt. The guard ends
them, undoes the changes in the journal and writes the outcome.
"""

from __future__ import annotations

import contextlib
import os
import select
import time

from shim.contract import faults, outcome
from shim.contract.errors import NoTurn, SwapKilled
from shim.kernel import alarm, held, process, survivors
from shim.kernel.cgroup import QuickMoves
from shim.restore import turns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shim.contract.ticket import Ticket

_DELETE_S = 10.0
_DIES_WITHIN_S = 5.0
_DONE = b"."
_MOVES_WITHIN_S, _EVERY_S = 0.3, 0.003


@contextlib.contextmanager
def watching(ticket: Ticket, runtime: Sequence[str], until: float) -> Iterator[None]:
    """Have a guard while the swap of `ticket` is under way. Raises OSError.

    runtime: the real runtime with its global flags. until: the deadline for the swap and its undo,
    on `time.monotonic`. The guard ends when this context is left; nobody waits for the guard,
    because a pod waits.
    """
    read_fd, write_fd = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if not pid:
        os.close(write_fd)
        _guard(ticket, runtime, until, parent, read_fd)
    os.close(read_fd)
    try:
        yield
    finally:
        with contextlib.suppress(BrokenPipeError):
            os.write(write_fd, _DONE)
        os.close(write_fd)
        os.waitpid(pid, os.WNOHANG)  # whoever inherits our children reaps a guard that still runs


def _guard(ticket: Ticket, runtime: Sequence[str], until: float, parent: int, read_fd: int) -> None:
    """Run the guard in the fork, and exit: no code of the caller may run on here in any case."""
    try:
        os.setsid()  # a signal to the parent's group is not for us
        alarm.cancel()
        faults.disarm()
        process.let_go_of_streams()
        with contextlib.suppress(OSError, ValueError):
            _keep_moves_quick(read_fd)
        if why := _wait(until, parent, read_fd):
            _clean_up(ticket, runtime, why)
    finally:
        os._exit(0)


def _keep_moves_quick(read_fd: int) -> None:
    """Keep moves between cgroups quick until the swap is over, or has had time enough.

    The runtime moves CRIU to the container's cgroups, and the process that fills shared memory goes
    there, too.
    """
    until = time.monotonic() + _MOVES_WITHIN_S
    moves = QuickMoves()
    try:
        moves.again()
        while time.monotonic() < until and not select.select([read_fd], [], [], _EVERY_S)[0]:
            moves.again()
    finally:
        moves.close()


def _wait(until: float, parent: int, read_fd: int) -> str:
    """Wait for the swap's end. Returns an empty text after a proper end, else the reason."""
    if select.select([read_fd], [], [], max(0, until - time.monotonic()))[0]:
        return "" if os.read(read_fd, 1) == _DONE else "quickthaw-runc was killed"
    held.kill_parent(parent)
    select.select([read_fd], [], [], _DELETE_S)
    return "quickthaw-runc hung, and was killed long after its deadline"


def _clean_up(ticket: Ticket, runtime: Sequence[str], why: str) -> None:
    """Clean up, mostly by the runtime's own poststop hook, if the runtime knows the container."""
    from shim.restore.forget import forget  # late: hardly ever needed, and a pod waits

    container = ticket.container
    survivors.kill(container, until=time.monotonic() + _DIES_WITHIN_S)
    with contextlib.suppress(process.TooLate, OSError):
        until = time.monotonic() + _DELETE_S
        process.run([*runtime, "delete", "--force", container], until=until, quiet=True)
    error = SwapKilled(
        "the swap was ended from outside", about=container, why=why,
        do="Was the node out of memory? See the kernel's log.",
    )  # fmt: skip
    with contextlib.suppress(OSError):
        outcome.write_killed(ticket, error)
    with contextlib.suppress(OSError, ValueError):  # the daemon tries again
        forget(container)
    with contextlib.suppress(OSError, NoTurn):  # the next restore sweeps, too
        turns.sweep(until=time.monotonic() + _DELETE_S)
