"""Snapshots as the plain JSON that `quickthaw ls` and `show` print.

The daemon answers with it, and the command line uses it on the store itself while the daemon is
away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shim.contract.manifest import Manifest
    from shim.store.store import Store

READY = "ready"
DAMAGED = "damaged"


def listed(store: Store, users: Mapping[str, Sequence[str]] | None) -> dict[str, Any]:
    """Every snapshot, the newest first, then the damaged ones.

    users: the containers of each snapshot id that have it in use; None when nobody knows.
    """
    rows = [_row(found, _uses(found.id, users)) for found in store.all()]
    rows += [_damaged(name, why) for name, why in sorted(store.damaged.items())]
    return {"snapshots": rows}


def shown(
    found: Manifest, users: Mapping[str, Sequence[str]] | None, *, log: str = ""
) -> dict[str, Any]:
    """One snapshot with its whole manifest. log: path of the log of its last failed restore."""
    return {
        "manifest": found.as_json(), "state": READY, "uses": _uses(found.id, users),
        "users": list((users or {}).get(found.id, ())), "log": log or None,
    }  # fmt: skip


def _row(found: Manifest, uses: int | None) -> dict[str, Any]:
    source = found.source
    return {
        "id": found.id, "name": found.name, "namespace": source.namespace, "pod": source.pod,
        "container": source.container, "image": source.image, "created_at": found.created_at,
        "size_bytes": found.sizes.total, "state": READY, "uses": uses, "reason": "",
    }  # fmt: skip


def _damaged(name: str, why: str) -> dict[str, Any]:
    return {
        "id": name, "name": "", "namespace": "", "pod": "", "container": "", "image": "",
        "created_at": None, "size_bytes": None, "state": DAMAGED, "uses": None, "reason": why,
    }  # fmt: skip


def _uses(snapshot: str, users: Mapping[str, Sequence[str]] | None) -> int | None:
    return None if users is None else len(users.get(snapshot, ()))
