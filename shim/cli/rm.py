"""`quickthaw rm`: remove snapshots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shim.cli import client
from shim.contract.errors import RequestRefused

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from shim.cli.output import Output

HELP: Final = "remove snapshots that no container uses"
EXAMPLES: Final = """\
examples:
  quickthaw rm 3f2a91c0
  quickthaw rm warm-model old-model
"""


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("snapshots", nargs="+", metavar="SNAPSHOT",
                        help="id, unique beginning of one, or name")  # fmt: skip


def run(asked: Namespace, out: Output) -> int:
    """Remove each; one that is refused does not stop the others. The last refusal's status."""
    removed: list[str] = []
    refused: list[dict[str, str]] = []
    code = 0
    for snapshot in asked.snapshots:
        try:
            removed.append(str(client.ask("rm", id=snapshot)["removed"]))
        except RequestRefused as refusal:
            out.note(str(refusal))
            refused.append({"snapshot": snapshot, "why": refusal.why})
            code = refusal.exit_code
    if out.as_json:
        out.json({"removed": removed, "refused": refused})
        return code
    for snapshot in removed:
        out.line(snapshot)
    return code
