"""Passes the outcome of a swap from `quickthaw-runc` to the daemon, which reports it.

The outcome is a file, not a message, because a pod must not wait for a daemon that may be away.
Lean: the swap path imports this module.
"""

from __future__ import annotations

import os
import time

from shim.contract import jsontext
from shim.contract.names import is_container_id, is_snapshot_id
from shim.contract.paths import OUTCOMES
from shim.contract.ticket import pod_of
from shim.kernel import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.contract.errors import SwapFailed
    from shim.contract.ticket import Ticket

SCHEMA = 1
_MAX_BYTES = 256 * 1024

RESTORED = "restored"
COLD = "cold"
KILLED = "killed"
"""The swap was ended from outside; the next attempt starts cold."""
REFUSED = "refused"
"""The swap failed, and the pod forbids a cold start (`fallback: fail`)."""


_RESULTS = (RESTORED, COLD, KILLED, REFUSED)
_FIELDS: dict[str, type] = {
    "snapshot": str,
    "result": str,
    "error": str,
    "error_class": str,
    "exit_code": int,
    "refusals": list,
    "blame": str,
    "deadline_s": float,
    "pod": dict,
    "seconds": float,
    "steps": dict,
    "warnings": list,
    "at": float,
}
_POD = {"namespace", "name", "uid", "container"}
_MOST_SECONDS = 1e12


class Outcome:
    """Tells how a swap ended. A field that is left out is empty or 0.

    result: RESTORED, COLD, KILLED or REFUSED. snapshot: empty if the ticket was unreadable.
    error: the message, or empty. error_class, exit_code: of the error. refusals: codes of the gate.
    blame: a word of Blame, or empty. deadline_s: of the ticket; 0: not known. pod: namespace,
    name, uid and container; empty if the ticket was unreadable. seconds: of the whole swap.
    steps: of `shim.kernel.steps`. warnings: messages for the journal. at: unix time.
    """

    __slots__ = tuple(_FIELDS)
    snapshot: str
    result: str
    error: str
    error_class: str
    exit_code: int
    refusals: list[str]
    blame: str
    deadline_s: float
    pod: dict[str, str]
    seconds: float
    steps: dict[str, float]
    warnings: list[str]
    at: float

    def __init__(self, **fields: object) -> None:
        """Raises ValueError for an unknown field, or a value that is out of range."""
        if unknown := fields.keys() - _FIELDS.keys():
            raise ValueError(f"unknown keys: {sorted(unknown)}")
        for name, kind in _FIELDS.items():
            value = fields.get(name, kind())
            setattr(self, name, _seconds(value, name) if kind is float else value)
            if kind is not float and type(value) is not kind:
                raise ValueError(f"{name} is {type(value).__name__}, not {kind.__name__}")
        if self.result not in _RESULTS or not 0 <= self.exit_code <= 255:
            raise ValueError("result or exit_code out of range")
        if self.snapshot and not is_snapshot_id(self.snapshot):
            raise ValueError("malformed snapshot id")
        if self.pod and self.pod.keys() != _POD:
            raise ValueError(f"pod has wrong keys: {sorted(self.pod.keys() ^ _POD)}")
        texts = [*self.refusals, *self.warnings, *self.pod.values(), *self.steps]
        if not all(isinstance(each, str) for each in texts):
            raise ValueError("refusals, warnings or pod have a value that is no text")
        self.steps = {step: _seconds(self.steps[step], step) for step in self.steps}

    def encode(self) -> bytes:
        """Returns the outcome as the JSON that `decode` accepts."""
        fields = {name: getattr(self, name) for name in _FIELDS}
        return jsontext.compose({"schema": SCHEMA, **fields}).encode()


def _seconds(value: object, name: str) -> float:
    if type(value) not in (int, float) or not 0 <= value < _MOST_SECONDS:  # type: ignore[operator]
        raise ValueError(f"{name} is no number of seconds")
    return float(value)  # type: ignore[arg-type]


def decode(data: bytes) -> Outcome:
    """Returns the outcome in `data`. Raises ValueError for damaged bytes and for other schemas.

    Ignores unknown keys: a newer `quickthaw-runc` may know more than this daemon.
    """
    fields = jsontext.parse(data)
    if not isinstance(fields, dict) or fields.get("schema") != SCHEMA:
        raise ValueError(f"not an outcome of schema {SCHEMA}")
    return Outcome(**{name: fields[name] for name in _FIELDS if name in fields})


def write(container: str, outcome: Outcome, directory: str = OUTCOMES) -> None:
    """Put the outcome in place with one rename. Raises OSError."""
    replace.put(f"{directory}/{container}.json", outcome.encode())


def write_killed(ticket: Ticket, error: SwapFailed, *, blame: str = "") -> None:
    """Write the outcome of a restore that was ended from outside, and why. Raises OSError.

    blame: if another than that of the error.
    """
    write(
        ticket.container,
        Outcome(
            snapshot=ticket.snapshot,
            result=KILLED,
            error=str(error),
            error_class=type(error).__name__,
            exit_code=error.exit_code,
            blame=blame or error.blame,
            pod=pod_of(ticket),
            at=time.time(),
        ),
    )


def take(container: str, directory: str = OUTCOMES) -> Outcome | None:
    """Read and remove the outcome of `container`; None when there is no outcome (yet).

    Raises ValueError for a damaged outcome, after removing the file; OSError.
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
    return decode(data)
