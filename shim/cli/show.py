"""`quickthaw show`: prints everything about a snapshot."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any, Final

from shim.cli import client, output
from shim.cli.foreach import SNAPSHOT, namespace_argument, qualified
from shim.contract.errors import DaemonAway
from shim.kernel.steps import durations

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from shim.cli.output import Output

HELP: Final = "show a snapshot: its source, its facts and its parts"
EXAMPLES: Final = """\
examples:
  quickthaw show 3f2a91c0             an id, or the beginning of one
  quickthaw show warm-model --facts   a name; with what a pod must be like to start from it
"""


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("snapshot", help=SNAPSHOT)
    namespace_argument(parser)
    parser.add_argument(
        "--facts", action="store_true", help="also list the facts that the gate compares"
    )


def run(asked: Namespace, out: Output) -> int:
    wanted = qualified(asked.snapshot, asked.namespace)
    try:
        answer = client.ask("show", id=wanted)
    except DaemonAway as away:
        answer = _offline(wanted, out, away)
    if out.as_json:
        out.json(answer)
        return 0
    manifest = answer["manifest"]
    out.fields(_identity(answer) | _origin(manifest) | _content(manifest))
    if asked.facts:
        out.line()
        out.table(("FACT", "VALUE"), sorted(manifest["facts"].items()))
    return 0


def _offline(snapshot: str, out: Output, away: DaemonAway) -> dict[str, Any]:
    from shim.cli import offline  # here: a daemon's answer makes this import needless
    from shim.store import listing

    store = offline.store(out, away)
    return listing.shown(store, store.get(snapshot), users=None, trust=offline.trust(store))


def _identity(answer: dict[str, Any]) -> dict[str, str]:
    manifest = answer["manifest"]
    return {
        "id": manifest["id"],
        "name": manifest["name"],
        "state": answer["state"],
        "reason": answer.get("reason") or "",
        "signature": _signature(answer["signature"]),
        "in use by": ", ".join(answer.get("users") or ()),
        "log": answer.get("log") or "",
        "key": manifest["key"],
        "created": f"{manifest['created']} ({output.age(manifest['created_at'])} ago)",
    }


def _signature(verdict: dict[str, str]) -> str:
    if verdict["state"] == "valid":
        return f"by {verdict['signer']} ({verdict['key']})"
    return f"{verdict['why']}. {verdict['do']}"


def _origin(manifest: dict[str, Any]) -> dict[str, str]:
    source, software = manifest["source"], manifest["software"]
    return {
        "pod": f"{source['namespace']}/{source['pod']} ({source['pod_uid']})",
        "container": f"{source['container']} ({source['container_id'][:12]})",
        "node": source["node"],
        "image": source["image"],
        "image digest": source["image_digest"],
        "command": shlex.join(source["command"]),
        "software": ", ".join(f"{name} {software[name]}" for name in sorted(software)),
    }


def _content(manifest: dict[str, Any]) -> dict[str, str]:
    sizes, timings = dict(manifest["sizes"]), durations(manifest["timings"])
    entries = sizes.pop("entries", 0)
    parts = ", ".join(f"{part} {output.size(sizes[part])}" for part in sizes)
    return {
        "size": f"{output.size(sum(sizes.values()))} ({parts}; {entries} inodes)",
        "files": str(len(manifest["files"])),
        "needs memory": output.size(manifest["requires"]["memory_bytes"]),
        "bound to": ", ".join(map(str, manifest["network"].get("bound_addresses") or ())),
        "captured in": ", ".join(f"{step} {json.dumps(timings[step])} s" for step in timings),
    }
