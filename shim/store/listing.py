"""Returns snapshots as the plain JSON that `quickthaw ls` and `show` print.

The daemon answers with this JSON. While the daemon is away, the command line makes the same JSON
from the store itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shim.contract.manifest import Manifest
    from shim.store.quarantine import Record
    from shim.store.store import Store
    from shim.trust.verdict import Trust

READY = "ready"
DAMAGED = "damaged"
UNTRUSTED = "untrusted"
"""No key that this node trusts has signed the snapshot: nothing starts from it."""
QUARANTINED = "quarantined"


def told(record: Record) -> str:
    """Returns the reason for a quarantine, in a line."""
    if record.damaged:
        return f"it is damaged: {record.reason}"
    count = f"{record.failures} restores failed in a row, each of another pod"
    return f"{count}, the last: {record.reason}"


def quarantined(store: Store) -> dict[str, Any]:
    """Returns every snapshot in quarantine, the latest first."""
    rows = []
    for snapshot, record in store.quarantine.all().items():
        found = next(iter(each for each in store.all() if each.id == snapshot), None)
        rows.append({
            "id": snapshot, "name": found.name if found else "",
            "namespace": found.source.namespace if found else "",
            "pod": found.source.pod if found else "",
            "since": record.at, "failures": record.failures, "damaged": record.damaged,
            "error_class": record.error_class, "reason": told(record), "by": record.by,
        })  # fmt: skip
    return {"quarantined": sorted(rows, key=lambda row: float(str(row["since"])), reverse=True)}


def listed(
    store: Store, users: Mapping[str, Sequence[str]] | None, *, trust: Trust
) -> dict[str, Any]:
    """Returns every snapshot, the newest first, then the damaged snapshots.

    users: the containers that use a snapshot, by its id; None if nobody knows.
    """
    rows = [
        _row(found, _uses(found.id, users), trust) | _state(store, found, trust)
        for found in store.all()
    ]
    rows += [_damaged(name, why) for name, why in sorted(store.damaged.items())]
    return {"snapshots": rows}


def shown(
    store: Store,
    found: Manifest,
    users: Mapping[str, Sequence[str]] | None,
    *,
    trust: Trust,
    log: str = "",
) -> dict[str, Any]:
    """Returns a snapshot with its whole manifest. log: path of its last failed restore's log."""
    verdict = trust.verdict(found)
    return {
        "manifest": found.as_json(), **_state(store, found, trust),
        "signature": verdict.as_json(), "uses": _uses(found.id, users),
        "users": list((users or {}).get(found.id, ())), "log": log or None,
    }  # fmt: skip


def _row(found: Manifest, uses: int | None, trust: Trust) -> dict[str, Any]:
    source, verdict = found.source, trust.verdict(found)
    return {
        "id": found.id, "name": found.name, "namespace": source.namespace, "pod": source.pod,
        "container": source.container, "image": source.image, "created_at": found.created_at,
        "size_bytes": found.sizes.total, "signature": verdict.state, "uses": uses,
    }  # fmt: skip


def _state(store: Store, found: Manifest, trust: Trust) -> dict[str, Any]:
    record, verdict = store.quarantine.get(found.id), trust.verdict(found)
    failures = record.failures if record else store.quarantine.failures(found.id)
    if not verdict.trusted:
        return {"state": UNTRUSTED, "reason": str(verdict), "failures": failures}
    if record:
        return {"state": QUARANTINED, "reason": told(record), "failures": failures}
    return {"state": READY, "reason": "", "failures": failures}


def _damaged(name: str, why: str) -> dict[str, Any]:
    return {
        "id": name, "name": "", "namespace": "", "pod": "", "container": "", "image": "",
        "created_at": None, "size_bytes": None, "state": DAMAGED, "signature": None,
        "uses": None, "reason": why, "failures": 0,
    }  # fmt: skip


def _uses(snapshot: str, users: Mapping[str, Sequence[str]] | None) -> int | None:
    return None if users is None else len(users.get(snapshot, ()))
