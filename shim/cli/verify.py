"""`quickthaw verify`: hashes snapshots, and says whether they are as they were captured.

Reads the store itself, hence without the daemon, which runs this verb in the background at boot.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import TYPE_CHECKING, Any, Final

from shim.cli.foreach import SNAPSHOT, namespace_argument, qualified
from shim.cli.output import duration, size
from shim.contract.errors import BadManifest, QuickthawError, SnapshotNotWhole
from shim.integrity.check import SnapshotCheck
from shim.kernel.beneath import open_dir
from shim.kernel.priority import be_expendable, become_idle, end_with_parent

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from shim.cli.output import Output
    from shim.contract.manifest import Manifest
    from shim.store.store import Store
    from shim.trust.verdict import Trust

HELP: Final = "hash snapshots and compare them with their captures"
EXAMPLES: Final = """\
examples:
  quickthaw verify                  all of them
  quickthaw verify 3f2a91c0 warm-model

Everything is read again, whatever was verified before.

exit status: 0 all are whole and signed by a key that this node trusts; 24 one is not what was
captured; 51 one has no manifest that can be read; 1 one is whole, but its signature is not trusted.
"""
_COLUMNS = ("ID", "NAME", "RESULT", "SIGNATURE", "HASHED", "TOOK")
WHOLE, CHANGED, DAMAGED = "whole", "changed", "damaged"
_UNTRUSTED = 1


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "snapshots", nargs="*", metavar="SNAPSHOT", help=f"{SNAPSHOT}; default: all"
    )  # fmt: skip
    namespace_argument(parser)
    # For the daemon: skips files verified since the node booted, and disturbs nobody.
    parser.add_argument("--background", action="store_true", help=argparse.SUPPRESS)


def run(asked: Namespace, out: Output) -> int:
    """Verify each snapshot. Returns the worst finding's status."""
    if asked.background:
        end_with_parent()
        become_idle()
        be_expendable()
    from shim.cli.offline import trust  # here: no other verb should pay these 60 ms
    from shim.store.store import Store

    store = Store()
    store.read_index()
    trusted = trust(store)
    wanted = [store.get(qualified(name, asked.namespace)) for name in asked.snapshots]
    wanted = wanted or store.find(namespace=asked.namespace)
    rows = [_verified(store, trusted, found, asked.background, out) for found in wanted]
    if not asked.snapshots and not asked.namespace:
        rows += [_damaged(name, why) for name, why in sorted(store.damaged.items())]
    if asked.background:
        out.line(json.dumps({"snapshots": rows}))
    elif out.as_json:
        out.json({"snapshots": rows})
    else:
        out.table(_COLUMNS, [_cells(row) for row in rows])
        for row in rows:
            for why in filter(None, (row["reason"], row["signature"]["why"])):
                out.note(f"{row['id'][:12]}: {why}")
    return max((_status(row) for row in rows), default=0)


def _verified(
    store: Store, trusted: Trust, found: Manifest, with_marks: bool, out: Output
) -> dict[str, Any]:
    began, reason, hashed = time.monotonic(), "", 0
    out.progress(f"reading {found.id[:12]}, {size(found.sizes.total)}")
    try:
        with (
            open_dir(str(store.snapshots / found.id)) as directory,
            SnapshotCheck(
                directory.fileno(), found, container=found.id, until=math.inf,
                with_marks=with_marks,
            ) as check,
        ):  # fmt: skip
            check.begin()
            check.finish()
            hashed = check.hashed_bytes + sum(map(len, check.images.values()))
    except SnapshotNotWhole as error:
        reason = error.why
    return {
        "id": found.id, "name": found.name, "result": CHANGED if reason else WHOLE,
        "reason": reason, "signature": trusted.verdict(found).as_json(), "hashed_bytes": hashed,
        "seconds": round(time.monotonic() - began, 3),
    }  # fmt: skip


def _damaged(name: str, why: str) -> dict[str, Any]:
    return {
        "id": name, "name": "", "result": DAMAGED, "reason": why,
        "signature": {"state": "", "why": ""}, "hashed_bytes": 0, "seconds": 0.0,
    }  # fmt: skip


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["id"][:12], row["name"], row["result"], row["signature"]["state"],
        size(row["hashed_bytes"]), duration(row["seconds"]),
    )  # fmt: skip


def _status(row: dict[str, Any]) -> int:
    failed: dict[str, type[QuickthawError]] = {CHANGED: SnapshotNotWhole, DAMAGED: BadManifest}
    if row["result"] in failed:
        return failed[row["result"]].exit_code
    return 0 if row["signature"]["state"] == "valid" else _UNTRUSTED
