"""`make soak`: pods come and go a thousand times, and nothing may grow.

A real node with the package as it is installed. RESTORES and CAPTURES in the environment set the
size; 0 leaves a part out. Writes build/soak.json with every level of every cycle. The exit status
is 1 when a level grew from the 50th cycle to the last, or a cycle failed; of fewer than 100 cycles,
from the middle on.
"""

import json
import os
import sys
import time
from typing import Final

from rich.console import Console
from rich.table import Table

from tests.node.base import BUILD
from tests.node.daemonfigures import Figures
from tests.node.node import Node
from tests.node.swapping import nothing_left
from tests.soak import cycles, levels
from tests.soak.levels import Growth, Levels
from tests.workers import images

SUITE: Final = os.environ.get("SUITE", "forky")
RESULT: Final = BUILD.parent / "soak.json"
PACKAGES: Final = BUILD.parent / "packages"
PARTS: Final = {
    "restores": (cycles.restores, int(os.environ.get("RESTORES", "1000"))),
    "captures": (cycles.captures, int(os.environ.get("CAPTURES", "200"))),
}
TELL_EVERY: Final = 50


def main() -> int:
    """Run the soak. Returns the exit status."""
    out = Console(highlight=False, soft_wrap=True)
    if any(0 < count < levels.LEAST for _, count in PARTS.values()):
        out.print(f"RESTORES and CAPTURES are 0, or {levels.LEAST} and more.")
        return 2
    found: dict[str, list[Levels]] = {}
    figures = Figures()
    (deb,) = PACKAGES.glob("*.deb")
    archive = images.build("probe")
    with Node(SUITE) as node:
        node.start_product(deb)
        node.import_image(archive)
        with nothing_left(node):
            for part, (cycle, count) in PARTS.items():
                if count:
                    found[part] = cycle(node, count, _teller(part, count, out))
                    figures.take(node)
    columns = {part: json.loads(levels.as_json(found[part])) for part in found}
    RESULT.write_text(json.dumps({**columns, "daemon": figures.as_json()}))
    grown = {part: levels.grown(taken) for part, taken in found.items()}
    for part, taken in found.items():
        out.print(_table(part, taken))
    out.print(str(figures))
    for part, growths in grown.items():
        for each in growths:
            out.print(f"[red]Wrong:[/red] {part}: {each}")
    return 1 if any(grown.values()) else 0


def _teller(part: str, count: int, out: Console) -> cycles.Tell:
    began = time.monotonic()

    def tell(number: int, seconds: float) -> None:
        if (number + 1) % TELL_EVERY == 0 or number + 1 == count:
            passed = time.monotonic() - began
            out.print(f"{passed:6.0f} s  {part} {number + 1}/{count}, the last in {seconds:.2f} s")

    return tell


def _table(part: str, taken: list[Levels]) -> Table:
    table = Table(title=f"{len(taken)} {part}")
    warm = levels.warm_up(len(taken))
    for heading in ("", "1st", f"{warm}th", "last", "highest"):
        table.add_column(heading, justify="right" if heading else "left")
    grown: dict[str, Growth] = {each.level: each for each in levels.grown(taken)}
    for level in taken[0]:
        values = [each[level] for each in taken]
        style = "red" if level in grown else ""
        shown = (values[0], values[warm - 1], values[-1], max(values))
        table.add_row(level, *map(str, shown), style=style)
    return table


if __name__ == "__main__":
    sys.exit(main())
