"""Passes the daemon's decision for a `create`. The only input of a swap that is trusted.

The daemon writes the ticket (`write`); `quickthaw-runc` reads it (`read`), and checks that only
root can have written it. Strict: an unknown or missing key is an error. Lean: the swap path imports
this module.
"""

from __future__ import annotations

import os
import stat

from shim.contract import jsontext
from shim.contract.errors import TicketUnreadable
from shim.contract.names import is_container_id, is_snapshot_id
from shim.contract.paths import TICKETS
from shim.kernel import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.contract.names import ContainerId, SnapshotId

SCHEMA = 4
_MAX_BYTES = 64 * 1024
_HEXADECIMAL = frozenset("0123456789abcdef")
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "container": str,
    "snapshot": str,
    "fallback": str,
    "deadline_s": (int, float),
    "turns": int,
    "turn_wait_s": (int, float),
    "turn_hold_s": (int, float),
    "pod_namespace": str,
    "pod_name": str,
    "pod_uid": str,
    "container_name": str,
    "resume": str,
    "gpu_pairs": list,
    "others": int,
}


class Ticket:
    """Names a container id, and the snapshot to restore the container from.

    fallback: `cold` or `fail`. deadline_s: seconds for the whole swap. turns: how many restores may
    run at the same time on the node. turn_wait_s: seconds in the restore queue at most.
    turn_hold_s: seconds that the restore may hold its place among the running restores at most.
    resume: the annotation's value (`http POST :8000/…`, `exec:…`) or the empty string. gpu_pairs:
    UUIDs (`GPU-…`) of captured GPUs, each with the UUID of the new GPU that takes its place.
    others: how many other containers the pod has now; kubelet starts one after the other.
    """

    __slots__ = tuple(_FIELDS)
    container: ContainerId
    snapshot: SnapshotId
    fallback: str
    deadline_s: float
    turns: int
    turn_wait_s: float
    turn_hold_s: float
    pod_namespace: str
    pod_name: str
    pod_uid: str
    container_name: str
    resume: str
    gpu_pairs: list[list[str]]
    others: int

    def __init__(self, **fields: object) -> None:
        if fields.keys() != _FIELDS.keys():
            raise ValueError(f"wrong keys: {sorted(fields.keys() ^ _FIELDS.keys())}")
        for name, kind in _FIELDS.items():
            value = fields[name]
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{name} is {type(value).__name__}")
            setattr(self, name, value)
        if not is_container_id(self.container) or not is_snapshot_id(self.snapshot):
            raise ValueError("malformed id")
        if self.fallback not in ("cold", "fail") or not 0 < self.deadline_s < 1e6:
            raise ValueError("fallback or deadline_s out of range")
        if not all(_is_pair(pair) for pair in self.gpu_pairs):
            raise ValueError("gpu_pairs are no pairs of UUIDs")
        if self.others < 0:
            raise ValueError("others out of range")
        if self.turns < 1 or not 0 <= self.turn_wait_s < 1e6 or not 0 < self.turn_hold_s < 1e8:
            raise ValueError("turns, turn_wait_s or turn_hold_s out of range")

    def encode(self) -> bytes:
        """Returns the ticket as the JSON that `decode` accepts."""
        fields = {name: getattr(self, name) for name in _FIELDS}
        return jsontext.compose({"schema": SCHEMA, **fields}).encode()


def _is_pair(value: object) -> bool:
    """Two UUIDs of GPUs, as NVML writes them."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    return all(isinstance(each, str) and _is_uuid(each) for each in value)


def _is_uuid(text: str) -> bool:
    digits = text.removeprefix("GPU-").replace("-", "")
    return text.startswith("GPU-") and len(digits) == 32 and set(digits) <= _HEXADECIMAL


def decode(data: bytes) -> Ticket:
    """Returns the ticket in `data`. Raises ValueError if `Ticket.encode` cannot have written it."""
    fields = jsontext.parse(data)
    if not isinstance(fields, dict) or fields.pop("schema", None) != SCHEMA:
        raise ValueError(f"not a ticket of schema {SCHEMA}")
    return Ticket(**fields)


def write(ticket: Ticket, directory: str = TICKETS) -> None:
    """Put the ticket in place with one rename, 0600. Not synced: no ticket outlives the boot."""
    replace.put(f"{directory}/{ticket.container}.json", ticket.encode())


def read(container: str, directory: str = TICKETS) -> Ticket:
    """Returns the ticket of `container`.

    Raises TicketUnreadable when the file is not a regular file of root with mode 0600, is damaged,
    or names another container.
    """
    try:
        if not is_container_id(container):
            raise ValueError("malformed container id")
        fd = os.open(f"{directory}/{container}.json", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_uid or status.st_mode & 0o077:
                raise ValueError("not a file of root alone")
            ticket = decode(file.read(_MAX_BYTES))
        if ticket.container != container:
            raise ValueError(f"the ticket is for {ticket.container}")
    except (OSError, ValueError) as error:
        raise TicketUnreadable(
            "cannot read the ticket", about=container, why=str(error),
            do="Restart quickthawd if tickets stay unreadable.",
        ) from error  # fmt: skip
    return ticket


def remove(container: str, directory: str = TICKETS) -> None:
    """Remove the ticket, if there is a ticket."""
    replace.take_away(f"{directory}/{container}.json")


def pod_of(ticket: Ticket) -> dict[str, str]:
    """Returns the pod for the outcome: the daemon may return only after the pod is gone."""
    return {
        "namespace": ticket.pod_namespace, "name": ticket.pod_name, "uid": ticket.pod_uid,
        "container": ticket.container_name,
    }  # fmt: skip
