"""`quickthaw status`: shows the daemon, and every container that opted in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from shim.cli import client, output

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from shim.cli.output import Output

HELP: Final = "show the daemon, and every container that opted in"
EXAMPLES: Final = """\
examples:
  quickthaw status
  quickthaw status --json | jq '.containers[] | select(.state == "cold")'

exit status: 60 while quickthawd is away; pods start cold then.
"""
_COLUMNS = ("NAMESPACE", "POD", "CONTAINER", "STATE", "FOR", "SNAPSHOT", "REASON")


def arguments(parser: ArgumentParser) -> None:
    """Add nothing: this verb has no arguments of its own."""


def run(asked: Namespace, out: Output) -> int:
    answer = client.ask("status")
    if out.as_json:
        out.json(answer)
        return 0
    out.fields(_daemon(answer["daemon"]) | _snapshots(answer))
    for row in answer.get("quarantined") or ():
        out.note(f"{row['id'][:12]} is in quarantine: {row['reason']}")
    if answer["containers"]:
        out.line()
        out.table(_COLUMNS, [_cells(row) for row in answer["containers"]])
    if answer["counters"]:
        out.line()
        rows = [(name, f"{value:g}") for name, value in sorted(answer["counters"].items())]
        out.table(("COUNTER", "VALUE"), rows)
    return 0


def _daemon(daemon: dict[str, Any]) -> dict[str, str]:
    nri = daemon["nri"]
    connected = f"connected for {output.age(nri.get('since'))}"
    away = f"not connected, pods start cold: {nri.get('reason')}"
    return {
        "quickthawd": f"{daemon['version']}, pid {daemon['pid']}, "
        f"up {output.duration(daemon['uptime_s'])}",
        "NRI": connected if nri["connected"] else away,
        "runtime": str(daemon.get("containerd") or ""),
        **_takes(daemon),
    }


def _takes(daemon: dict[str, Any]) -> dict[str, str]:
    """Returns the daemon's use of resources. A daemon of an older version does not report this."""
    loop, memory = daemon.get("loop"), daemon.get("memory")
    if not loop or not memory:
        return {}
    cpu_ms, wall_ms = loop["greatest_step_cpu_s"] * 1000, loop["greatest_step_s"] * 1000
    return {
        "event loop": f"busy for {cpu_ms:.0f} ms at most ({wall_ms:.0f} ms with waiting for a "
        f"processor), {loop['slow_steps']} of {loop['steps']} steps slow",
        "memory": f"{output.size(memory['bytes'])}, {output.size(memory['peak_bytes'])} at most",
    }


def _snapshots(answer: dict[str, Any]) -> dict[str, str]:
    if "snapshots" not in answer:
        return {}
    quarantined = len(answer.get("quarantined") or ())
    left = f", {quarantined} of them in quarantine" if quarantined else ""
    return {"snapshots": f"{answer['snapshots']}{left}"}


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["namespace"], row["pod"], row["container"], row["state"],
        output.duration(row["seconds"]), (row["snapshot"] or "")[:12], row["reason"] or "",
    ]  # fmt: skip
