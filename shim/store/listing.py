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
    from shim.trust.verdict import Trust

READY = "ready"
DAMAGED = "damaged"
UNTRUSTED = "untrusted"
"""Not signed by a key that this node trusts: nothing starts from it."""


def listed(
    store: Store, users: Mapping[str, Sequence[str]] | None, *, trust: Trust
) -> dict[str, Any]:
    """Every snapshot, the newest first, then the damaged ones.

    users: the containers of each snapshot id that have it in use; None when nobody knows.
    """
    rows = [_row(found, _uses(found.id, users), trust) for found in store.all()]
    rows += [_damaged(name, why) for name, why in sorted(store.damaged.items())]
    return {"snapshots": rows}


def shown(
    found: Manifest, users: Mapping[str, Sequence[str]] | None, *, trust: Trust, log: str = ""
) -> dict[str, Any]:
    """One snapshot with its whole manifest. log: path of the log of its last failed restore."""
    verdict = trust.verdict(found)
    return {
        "manifest": found.as_json(), "state": READY if verdict.trusted else UNTRUSTED,
        "signature": verdict.as_json(), "uses": _uses(found.id, users),
        "users": list((users or {}).get(found.id, ())), "log": log or None,
    }  # fmt: skip


def _row(found: Manifest, uses: int | None, trust: Trust) -> dict[str, Any]:
    source, verdict = found.source, trust.verdict(found)
    return {
        "id": found.id, "name": found.name, "namespace": source.namespace, "pod": source.pod,
        "container": source.container, "image": source.image, "created_at": found.created_at,
        "size_bytes": found.sizes.total, "state": READY if verdict.trusted else UNTRUSTED,
        "signature": verdict.state, "uses": uses,
        "reason": "" if verdict.trusted else str(verdict),
    }  # fmt: skip


def _damaged(name: str, why: str) -> dict[str, Any]:
    return {
        "id": name, "name": "", "namespace": "", "pod": "", "container": "", "image": "",
        "created_at": None, "size_bytes": None, "state": DAMAGED, "signature": None,
        "uses": None, "reason": why,
    }  # fmt: skip


def _uses(snapshot: str, users: Mapping[str, Sequence[str]] | None) -> int | None:
    return None if users is None else len(users.get(snapshot, ()))
