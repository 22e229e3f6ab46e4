"""`quickthaw keys`: manages the keys whose snapshots this node uses, and its own signing key.

Works on the key directory itself, hence without the daemon, which sees every change at its next
decision.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any, Final

from shim.contract.paths import KEYS, NODE_PUBLIC

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from shim.cli.output import Output
    from shim.trust.keyfile import PublicKey
    from shim.trust.keys import KeyDirectory, KeyEntry, Keyring

HELP: Final = "list, trust and revoke the keys that sign snapshots, and rotate the key of this node"
EXAMPLES: Final = f"""\
examples:
  quickthaw keys ls
  quickthaw keys trust node-7.pub               the file {KEYS}/{NODE_PUBLIC} of node-7
  ssh node-7 cat {KEYS}/{NODE_PUBLIC} | quickthaw keys trust - --name node-7
  quickthaw keys revoke node-7                  its name, its id, or the beginning of that
  quickthaw keys rotate                         a new key; what the old one signed stays trusted

exit status: 44 a key is refused; 45 no such key.
"""
_COLUMNS = ("ID", "ROLE", "NAME", "FILE")
NODE, TRUSTED, REVOKED = "node", "trusted", "revoked"


def arguments(parser: ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = verbs.add_parser("ls", help="list the keys and their faults")
    made = verbs.add_parser("init", help="make the key of this node, if the node has no key")
    rotated = verbs.add_parser("rotate", help="give this node a new key; the old one stays trusted")
    trusted = verbs.add_parser("trust", help="use snapshots that are signed with another key")
    trusted.add_argument(
        "file", metavar="FILE", help="node.pub of another node; - reads standard input"
    )
    trusted.add_argument("--name", help="the name of the key here; default: the file's name")
    revoked = verbs.add_parser(
        "revoke", help="refuse every snapshot that a key has signed, for good"
    )
    revoked.add_argument(
        "key", metavar="KEY", help="an id, the unique beginning of an id, or a name"
    )
    for verb, does in (
        (listing, _ls), (made, _init), (rotated, _rotate), (trusted, _trust), (revoked, _revoke),
    ):  # fmt: skip
        verb.set_defaults(does=does)
        verb.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print JSON"
        )


def run(asked: Namespace, out: Output) -> int:
    answer: dict[str, Any] = asked.does(asked, out, directory())
    if out.as_json:
        out.json(answer)
    return 0


def directory() -> KeyDirectory:
    """Returns the keys of this node."""
    from shim.trust.keys import KeyDirectory  # here: no other verb should pay these 60 ms

    return KeyDirectory()


def _ls(_asked: Namespace, out: Output, keys: KeyDirectory) -> dict[str, Any]:
    ring = keys.current()
    rows = _rows(ring)
    if not out.as_json:
        out.table(_COLUMNS, [[row["id"], row["role"], row["name"], row["file"]] for row in rows])
        for problem in ring.problems:
            out.note(str(problem))
        if ring.broken:
            out.note(f"no key counts, and every pod starts cold, because of {ring.broken}")
    problems = [{"file": each.file, "why": each.why, "do": each.do} for each in ring.problems]
    return {"keys": rows, "problems": problems, "broken": ring.broken}


def _rows(ring: Keyring) -> list[dict[str, str]]:
    """Returns a row for each key, the node's own first. A revoked key is revoked in all rows."""
    own = [(NODE, ring.own)] if ring.own else []
    rest = [(TRUSTED, entry) for entry in ring.trusted]
    found = [
        (REVOKED if ring.revocation(entry.key.id) else role, entry) for role, entry in own + rest
    ]
    return [_row(role, entry) for role, entry in found + [(REVOKED, each) for each in ring.revoked]]


def _row(role: str, entry: KeyEntry) -> dict[str, str]:
    return {"id": entry.key.id, "role": role, "name": entry.name, "file": entry.file}


def _init(_asked: Namespace, out: Output, keys: KeyDirectory) -> dict[str, Any]:
    from shim.trust import change

    key, made = change.initialise(keys)
    _tell(out, key, "made" if made else "is this node's key already")
    return {"id": key.id, "made": made}


def _rotate(_asked: Namespace, out: Output, keys: KeyDirectory) -> dict[str, Any]:
    from shim.trust import change

    key, former = change.rotate(keys)
    _tell(out, key, "signs from now on")
    if former:
        _tell(out, former.key, f"stays trusted, as {former.name}, until it is revoked")
    if not out.as_json:
        out.note(f"give {keys.path}/{NODE_PUBLIC} to the nodes that use snapshots of this node")
    return {"id": key.id, "former": former.key.id if former else None}


def _trust(asked: Namespace, out: Output, keys: KeyDirectory) -> dict[str, Any]:
    from shim.trust import change

    entry, added = change.trust(keys, *_given(asked))
    _tell(out, entry.key, f"{'is' if added else 'was already'} trusted, as {entry.name}")
    return {"id": entry.key.id, "name": entry.name, "added": added}


def _given(asked: Namespace) -> tuple[bytes, str]:
    """Returns the content of the file, bounded, and the name for the key."""
    from pathlib import Path

    from shim.trust.keyfile import MAX_BYTES

    if asked.file == "-":
        return sys.stdin.buffer.read(MAX_BYTES + 1), asked.name or "stdin"
    path = Path(asked.file)
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1), asked.name or path.stem


def _revoke(asked: Namespace, out: Output, keys: KeyDirectory) -> dict[str, Any]:
    from shim.trust import change

    entry, added = change.revoke(keys, asked.key)
    _tell(out, entry.key, f"{'is' if added else 'was already'} revoked, by {entry.file}")
    return {"id": entry.key.id, "name": entry.name, "added": added}


def _tell(out: Output, key: PublicKey, what: str) -> None:
    if not out.as_json:
        out.line(f"{key.id} {what}")
