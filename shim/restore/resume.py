"""Tells a restored workload about its new pod: restored.json, then the resume call.

Trusts none of the workload's answers; a call that fails or is late fails the swap.
"""

from __future__ import annotations

import time

from shim.contract import jsontext
from shim.contract.errors import ResumeFailed
from shim.contract.paths import CONTROL, RESTORED_FILE
from shim.kernel import process, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from shim.contract.manifest import Manifest
    from shim.contract.ticket import Ticket
    from shim.oci.spec import Spec


def tell(ticket: Ticket, manifest: Manifest, spec: Spec, addresses: Sequence[str]) -> None:
    """Write restored.json into the control directory, before the first restored instruction.

    A container may have written into the directory: this function follows no link there. The
    environment in the file may hold secrets: the user of the container's process can read the file
    and no other user can, as with /proc/1/environ. Raises OSError.
    """
    told = {
        "schema": 1,
        "snapshot": ticket.snapshot,
        "pod": ticket.pod_name,
        "namespace": ticket.pod_namespace,
        "uid": ticket.pod_uid,
        "container": ticket.container_name,
        "ips": list(addresses),
        "hostname": spec.hostname or spec.environment.get("HOSTNAME", ""),
        "environment": spec.environment,
        "gpus": dict(ticket.gpu_pairs),
        "away_s": max(0.0, time.time() - manifest.created_at),
    }
    path = f"{CONTROL}/{ticket.container}/{RESTORED_FILE}"
    replace.put(path, jsontext.compose(told), owner=spec.owner, mode=0o400)


def untell(ticket: Ticket) -> None:
    """Remove restored.json: a cold start follows. A missing file is no error."""
    replace.take_away(f"{CONTROL}/{ticket.container}/{RESTORED_FILE}")


def call_workload(ticket: Ticket, netns: str, runtime: Sequence[str], *, until: float) -> None:
    """Make the call that the pod's `resume` annotation asks for, if any.

    runtime: the real runtime with its global flags. Raises ResumeFailed.
    """
    if not ticket.resume:
        return
    from shim.workload import call

    kind, _, rest = ticket.resume.partition(":" if ticket.resume.startswith("exec") else " ")
    try:
        if kind == "exec":
            _exec(ticket.container, runtime, jsontext.parse(rest), until)
        elif kind == "http":
            method, _, address = rest.partition(" ")
            port, slash, target = address.removeprefix(":").partition("/")
            call.http(netns, method, int(port), slash + target, until=until)
    except (call.CallFailed, process.TooLate, OSError, ValueError) as error:
        raise ResumeFailed(
            "the resume call failed", about=ticket.container, why=str(error),
            do="Check the pod's quickthaw.io/resume annotation and the workload's answer.",
        ) from error  # fmt: skip


def _exec(container: str, runtime: Sequence[str], argv: Sequence[str], until: float) -> None:
    status = process.run([*runtime, "exec", container, *argv], until=until, quiet=True)
    if status:
        raise ValueError(f"{argv[0]} ended with status {status}")
