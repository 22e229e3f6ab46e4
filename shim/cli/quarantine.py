"""`quickthaw quarantine`: lists and releases snapshots that pods do not use after failures."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Final

from shim.cli import client, output
from shim.cli.foreach import SNAPSHOT, ask_for_each, namespace_argument
from shim.contract.errors import DaemonAway

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from shim.cli.output import Output

HELP: Final = "list the snapshots in quarantine, or release some"
EXAMPLES: Final = """\
examples:
  quickthaw quarantine ls
  quickthaw quarantine ls --json | jq -r '.quarantined[].id'
  quickthaw quarantine release 3f2a91c0

What is in quarantine is removed like every other snapshot: quickthaw rm 3f2a91c0
"""
_COLUMNS = ("ID", "NAME", "NAMESPACE", "POD", "SINCE", "FAILURES", "ERROR")


def arguments(parser: ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="what", metavar="ls|release", required=True)
    listing = verbs.add_parser("ls", help="list the snapshots in quarantine, the latest first")
    release = verbs.add_parser(
        "release", help="let pods start from the snapshots again, with a count of 0 failures"
    )
    release.add_argument("snapshots", nargs="+", metavar="SNAPSHOT", help=SNAPSHOT)
    namespace_argument(release)
    for verb in (listing, release):
        # So that this option does not overwrite an option before the inner verb.
        verb.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print JSON"
        )


def run(asked: Namespace, out: Output) -> int:
    if asked.what == "release":
        return ask_for_each(
            "release", "released", asked.snapshots, out, namespace=asked.namespace
        )  # fmt: skip
    try:
        answer = client.ask("quarantine")
    except DaemonAway as away:
        answer = _offline(out, away)
    if out.as_json:
        out.json(answer)
        return 0
    out.table(_COLUMNS, [_cells(row) for row in answer["quarantined"]])
    for row in answer["quarantined"]:
        out.note(f"{row['id'][:12]}: {row['reason']}")
    return 0


def _offline(out: Output, away: DaemonAway) -> dict[str, Any]:
    from shim.cli import offline  # here: a daemon's answer makes this import needless
    from shim.store import listing

    return listing.quarantined(offline.store(out, away))


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["id"][:12], row["name"], row["namespace"], row["pod"], output.age(row["since"]),
        str(row["failures"]), row["error_class"],
    ]  # fmt: skip
