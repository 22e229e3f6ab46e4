"""`quickthaw ls`: lists the snapshots of this node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from shim.cli import client, output
from shim.contract.errors import DaemonAway

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from shim.cli.output import Output

HELP: Final = "list the snapshots of this node, the newest first"
EXAMPLES: Final = """\
examples:
  quickthaw ls
  quickthaw ls -n models
  quickthaw ls --json | jq -r '.snapshots[].id'
"""
_COLUMNS = ("ID", "NAME", "NAMESPACE", "POD", "CONTAINER", "IMAGE", "AGE", "SIZE", "STATE", "USES")


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "-n", "--namespace", default="", help="list snapshots of this Kubernetes namespace only"
    )


def run(asked: Namespace, out: Output) -> int:
    try:
        answer = client.ask("ls")
    except DaemonAway as away:
        answer = _offline(out, away)
    if asked.namespace:
        rows = [row for row in answer["snapshots"] if row["namespace"] == asked.namespace]
        answer = {**answer, "snapshots": rows}
    if out.as_json:
        out.json(answer)
        return 0
    out.table(_COLUMNS, [_cells(row) for row in answer["snapshots"]])
    for row in answer["snapshots"]:
        if row.get("reason"):
            out.note(f"{row['id'][:12]} is {row['state']}: {row['reason']}")
    return 0


def _offline(out: Output, away: DaemonAway) -> dict[str, Any]:
    from shim.cli import offline  # here: a daemon's answer makes this import needless
    from shim.store import listing

    store = offline.store(out, away)
    return listing.listed(store, users=None, trust=offline.trust(store))


def _cells(row: dict[str, Any]) -> list[str]:
    uses = row["uses"]
    return [
        row["id"][:12], row["name"], row["namespace"], row["pod"], row["container"], row["image"],
        output.age(row["created_at"]), output.size(row["size_bytes"]), row["state"],
        output.NOTHING if uses is None else str(uses),
    ]  # fmt: skip
