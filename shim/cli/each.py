"""One request for each of several snapshots, for the verbs that take more than one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shim.cli import client
from shim.contract.errors import RequestRefused

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shim.cli.output import Output


def ask_for_each(verb: str, done: str, snapshots: Iterable[str], out: Output) -> int:
    """Ask `verb` for each; one that is refused does not stop the others.

    done: where the answer, and the JSON that is printed, have the snapshot. Returns the last
    refusal's exit status, 0 without one.
    """
    took: list[str] = []
    refused: list[dict[str, str]] = []
    code = 0
    for snapshot in snapshots:
        try:
            took.append(str(client.ask(verb, id=snapshot)[done]))
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
