"""`quickthaw rm`: removes snapshots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shim.cli.foreach import SNAPSHOT, ask_for_each, namespace_argument

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from shim.cli.output import Output

HELP: Final = "remove snapshots that no container uses"
EXAMPLES: Final = """\
examples:
  quickthaw rm 3f2a91c0
  quickthaw rm warm-model old-model
  quickthaw rm warm-model -n models    where several namespaces have a snapshot of this name
"""


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("snapshots", nargs="+", metavar="SNAPSHOT", help=SNAPSHOT)
    namespace_argument(parser)


def run(asked: Namespace, out: Output) -> int:
    return ask_for_each("rm", "removed", asked.snapshots, out, namespace=asked.namespace)
