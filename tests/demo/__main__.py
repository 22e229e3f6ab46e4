"""`make demo`: a pod starts cold and is captured, later pods start from the snapshot.

Everything is real: Debian's containerd, runc and CRIU, our package as it is installed, kubelet's
calls, an inference server and its inputs. Prints a story, writes build/demo.json. The exit status
is 1 when answers differ, a process is not the captured process, the restore is not fast enough, or
the shim adds too much; 2 when something is left behind.
"""

import json
import os
import sys
import time
from typing import Final

from rich.console import Console
from rich.table import Table

from tests.demo.figures import OVERHEAD_AT_MOST_MS, SPEEDUP_AT_LEAST, Spread
from tests.demo.story import Found, Story, machine
from tests.node.base import BUILD, node_root
from tests.node.inventory import HostInventory, take_host
from tests.node.node import Node
from tests.node.swapping import nothing_left
from tests.workers import images

SUITE: Final = "forky"
RESULT: Final = BUILD.parent / "demo.json"
PACKAGES: Final = BUILD.parent / "packages"


def main() -> int:
    """Run the demo. Returns the exit status."""
    out = Console(highlight=False, soft_wrap=True)
    out.print("Making a node and the worker's image: minutes the first time, then kept in build/")
    node_root(SUITE)
    images.build("inference")
    before = take_host(os.getpid())
    with Node(SUITE) as node:
        found, facts = _on(node, out)
    if left := _left_on_host(before):
        out.print(f"[red]Left on this machine:[/red] {left}")
        return 2
    out.print("Nothing of the node is left: no process, mount, cgroup, network or file.")
    result = {"node": SUITE, **found.as_json(), "machine": facts}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    out.print(f"Written to {RESULT.relative_to(BUILD.parents[1])}")
    return verdict(found, out)


def _on(node: Node, out: Console) -> tuple[Found, dict[str, str]]:
    began = time.monotonic()

    def tell(text: str) -> None:
        out.print(f"[dim]{time.monotonic() - began:5.1f} s[/dim]  {text}")

    (deb,) = PACKAGES.glob("*.deb")
    facts = machine(node)
    tell(
        f"A node: Debian {SUITE} with containerd {facts['containerd']}, runc {facts['runc']}, "
        f"CRIU {facts['criu']} on {facts['kernel']}, {facts['cores']} cores"
    )
    node.start_product(deb)
    tell(f"Installed {deb.name}, started containerd and quickthawd")
    node.import_image(images.build("inference"))
    tell("Imported the image of an inference server: four models on onnxruntime behind HTTP")
    with nothing_left(node):
        found = Story(node, images.real_inputs(), tell).run()
    return found, facts


def _left_on_host(before: HostInventory) -> list[str]:
    after = take_host(os.getpid())
    kinds = ("mounts", "cgroups", "links", "processes", "runs")
    return [
        f"{kind} {name}"
        for kind in kinds
        for name in sorted(set(getattr(after, kind)) - set(getattr(before, kind)))
    ]


def verdict(found: Found, out: Console) -> int:
    """Print the table and the failures. Returns 1 when there is a failure, else 0."""
    out.print(_table(found))
    for each in found.overheads:
        out.print(
            f"quickthaw-runc adds [b]{each.added_ms.median:.2f} ms[/b] to `{each.call}` of a "
            f"container without a ticket (middle half {each.added_ms.q1:.2f} to "
            f"{each.added_ms.q3:.2f}; {each.plain_ms.median:.1f} ms without it; "
            f"{each.added_ms.count} pairs)"
        )
    failures = list(found.differences)
    if not found.source_serves:
        failures.append("first: the pod does not serve as before the capture")
    if found.speedup < SPEEDUP_AT_LEAST:
        failures.append(f"a restore is {found.speedup:.1f} times as fast, not {SPEEDUP_AT_LEAST}")
    if found.overhead_ms > OVERHEAD_AT_MOST_MS:
        failures.append(f"the shim adds {found.overhead_ms:.2f} ms, not {OVERHEAD_AT_MOST_MS}")
    for failure in failures:
        out.print(f"[red]Wrong:[/red] {failure}")
    return 1 if failures or not (found.answers_equal and found.init_is_restored) else 0


def _table(found: Found) -> Table:
    table = Table(title="Seconds from StartContainer to the first answered request")
    for heading in ("", "median", "fastest", "slowest", "runs"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = {"cold start": found.seconds("cold"), "restore": found.seconds("restore")}
    for name, spread in rows.items():
        table.add_row(name, *_cells(spread))
    table.add_row("capture pause", f"{found.frozen_s:.2f}", "", "", "1")
    table.caption = f"{found.speedup:.1f} times as fast; answers " + (
        "equal" if found.answers_equal else "DIFFER"
    )
    return table


def _cells(spread: Spread) -> list[str]:
    figures = (spread.median, spread.min, spread.max)
    return [*(f"{figure:.2f}" for figure in figures), str(spread.count)]


if __name__ == "__main__":
    sys.exit(main())
