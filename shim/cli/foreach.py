"""Sends a request for each of several snapshots, for the verbs that take several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shim.cli import client
from shim.contract.errors import RequestRefused

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Iterable

    from shim.cli.output import Output


SNAPSHOT: Final = "an id, the unique beginning of an id, or [NAMESPACE/]NAME"


def namespace_argument(parser: ArgumentParser) -> None:
    """Add the option for the namespace of a snapshot's name."""
    parser.add_argument(
        "-n", "--namespace", default="", help="the snapshot's Kubernetes namespace"
    )  # fmt: skip


def qualified(snapshot: str, namespace: str) -> str:
    """Returns the name for the store: several namespaces may have a snapshot of the same name."""
    return f"{namespace}/{snapshot}" if namespace and "/" not in snapshot else snapshot


def ask_for_each(
    verb: str, done: str, snapshots: Iterable[str], out: Output, *, namespace: str = ""
) -> int:
    """Ask `verb` for each snapshot; a refusal does not stop the others.

    done: the key of the snapshot in the answer, and in the printed JSON. Returns the last refusal's
    exit status, 0 without a refusal.
    """
    took: list[str] = []
    refused: list[dict[str, str]] = []
    code = 0
    for snapshot in snapshots:
        try:
            took.append(str(client.ask(verb, id=qualified(snapshot, namespace))[done]))
        except RequestRefused as refusal:
            out.note(str(refusal))
            refused.append({"snapshot": snapshot, "why": refusal.why})
            code = refusal.exit_code
    if out.as_json:
        out.json({done: took, "refused": refused})
        return code
    for snapshot in took:
        out.line(snapshot)
    return code
