"""Makes the error for a failed restore: the cause, the log's place, and the blame. Lean.

A pod and its author decide the conditions for CRIU in the new pod: another container listens on the
same port, a file in a volume is gone or has another size, the pod may have no more processes. Two
such pods must not take the snapshot away from all others.
"""

from __future__ import annotations

import errno
import os

from shim.contract import jsontext
from shim.contract.errors import Blame, CriuRestoreFailed, SwapTooLate
from shim.criu.log import is_killed
from shim.gate import volumes
from shim.restore import logs
from shim.restore.waits import on_file_system

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shim.contract.ticket import Ticket
    from shim.oci.spec import Spec

_OF_THE_POD = tuple(
    os.strerror(number)
    for number in (
        errno.EADDRINUSE, errno.EADDRNOTAVAIL,  # of its network
        errno.EAGAIN, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT,  # of its limits, or the node
        errno.EMFILE, errno.ENFILE, errno.EROFS, errno.ENODEV,
        # of a volume whose server is away
        errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN,
        errno.EHOSTUNREACH, errno.EREMOTEIO,
    )
)  # fmt: skip


def of_criu(ticket: Ticket, facts: Mapping[str, str], work: str, reason: str) -> CriuRestoreFailed:
    """Returns the error for a restore that ended with `reason`. facts: of the snapshot's manifest.

    work: CRIU's work directory; this function keeps the log that is in it.
    """
    error = CriuRestoreFailed(
        "cannot restore the process tree", about=ticket.container, why=reason,
        do=f"CRIU's log: {_keep_log(ticket, work)}.",
    )  # fmt: skip
    # CRIU that did not even begin has not looked at the snapshot.
    began = os.path.exists(f"{work}/restore.log")
    if not began or is_of_the_pod(reason, _volume_files(facts)):
        error.blame = Blame.OTHER
    return error


def too_late(ticket: Ticket, spec: Spec, where: str, why: str, *, of_snapshot: bool) -> SwapTooLate:
    """Returns the error for a deadline that passed. spec: of the new container.

    of_snapshot: it passed in a step that depends on nothing but the snapshot; no other step blames
    the snapshot. CRIU works in the container's cgroup: with less than one processor CRIU is as slow
    as the pod's author wants it to be. And CRIU waits for the servers of the pod's volumes.
    """
    waits = on_file_system(ticket.container) if of_snapshot else ""
    why = "; ".join(filter(None, [why, waits]))
    error = SwapTooLate(
        f"the swap's deadline passed {where}", about=ticket.container,
        why=f"{why}; {ticket.deadline_s:g} s are allowed, {ticket.turn_hold_s:g} s with a turn",
        do="Find what is slow, or raise quickthaw.io/deadline, and restore_hold_s in the "
        "configuration.",
    )  # fmt: skip
    if not of_snapshot or waits or 0 < spec.cpus < 1:
        error.blame = Blame.OTHER
    return error


def is_of_the_pod(reason: str, volume_files: Sequence[str]) -> bool:
    """Returns whether the cause lies outside the snapshot: kernel words, SIGKILL, a volume's file.

    volume_files: absolute paths; CRIU's messages omit the first slash. A snapshot's author who
    names a file with such words keeps only his own snapshot out of quarantine.
    """
    if is_killed(reason) or any(words in reason for words in _OF_THE_POD):
        return True
    return any(path.lstrip("/") in reason for path in volume_files if path.strip("/"))


def _volume_files(facts: Mapping[str, str]) -> list[str]:
    try:
        files, sockets_in = volumes.parse(jsontext.parse(facts.get("volume_files", "null")))
    except ValueError:
        return []  # the gate has refused it already
    return [*(each.path for each in files), *sockets_in]


def _keep_log(ticket: Ticket, work: str) -> str:
    """Put CRIU's log where it outlives the container, and return that place."""
    try:
        kept = logs.keep(f"{work}/restore.log", ticket.snapshot)
    except OSError as error:  # the reason is told all the same
        return f"lost: {error}"
    return kept or "missing: CRIU did not start"
