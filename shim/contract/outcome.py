"""Passes the outcome of a swap from `quickthaw-runc` to the daemon, which reports it.

The outcome is a file, not a message, because a pod must not wait for a daemon that may be away.
Lean: the swap path imports this module.
"""

from __future__ import annotations

import os
import time

from shim.contract import jsontext
from shim.contract.names import is_container_id
from shim.contract.paths import OUTCOMES
from shim.contract.ticket import pod_of
from shim.kernel import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.contract.errors import SwapFailed
    from shim.contract.ticket import Ticket

_MAX_BYTES = 256 * 1024

RESTORED = "restored"
COLD = "cold"
KILLED = "killed"
"""The swap was ended from outside; the next attempt starts cold."""
REFUSED = "refused"
"""The swap failed, and the pod forbids a cold start (`fallback: fail`)."""


def write(container: str, outcome: dict[str, object], directory: str = OUTCOMES) -> None:
    """Write the outcome to a file, and put the file in place with one rename. Raises OSError.

    Keys: snapshot, result (RESTORED, COLD, KILLED, REFUSED), error (message or ""), error_class,
    exit_code, blame (a word of Blame or ""), deadline_s (of the ticket; 0 or missing: not known),
    pod {namespace, name, uid, container}, seconds,
    steps {name: seconds}, warnings [message], at (unix time).
    """
    text = jsontext.compose({"schema": 1, **outcome})
    replace.put(f"{directory}/{container}.json", text)


def write_killed(ticket: Ticket, error: SwapFailed, *, blame: str = "") -> None:
    """Write the outcome of a restore that was ended from outside, and why. Raises OSError.

    blame: if another than that of the error.
    """
    write(ticket.container, {
        "snapshot": ticket.snapshot, "result": KILLED, "error": str(error),
        "error_class": type(error).__name__, "exit_code": error.exit_code,
        "refusals": [], "blame": blame or error.blame, "pod": pod_of(ticket),
        "seconds": 0.0, "steps": {}, "warnings": [], "at": time.time(),
    })  # fmt: skip


def take(container: str, directory: str = OUTCOMES) -> dict[str, object] | None:
    """Read and remove the outcome of `container`; None when there is no outcome (yet).

    Raises ValueError for a damaged outcome, after removing the file.
    """
    if not is_container_id(container):
        raise ValueError("malformed container id")
    path = f"{directory}/{container}.json"
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES)
        os.unlink(path)
    except FileNotFoundError:
        return None
    outcome = jsontext.parse(data)
    if not isinstance(outcome, dict):
        raise ValueError("not an object")
    return outcome
