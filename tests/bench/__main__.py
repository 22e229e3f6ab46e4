"""`make bench`: cold start, runc's restore, podman's import and quickthaw, side by side.

Writes build/bench.json and build/bench.html. Both keep figures of an earlier run that this run does
not measure. The exit status is 1 when a part could not be measured, 2 for a wrong plan; a missed
target is reported, and is no failure.
"""

import os
import sys
import time
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from tests.bench import document
from tests.bench.parts import Bench
from tests.bench.plan import Plan, WrongPlan
from tests.bench.result import Results

MARKS: Final = {True: "[green]yes[/green]", False: "[red]no[/red]", None: "not measured"}


def main() -> int:
    """Run the bench. Returns the exit status."""
    out = Console(highlight=False, soft_wrap=True)
    try:
        plan = Plan.of(os.environ)
    except WrongPlan as error:
        out.print(f"[red]{error}[/red]")
        return 2
    began, before = time.monotonic(), document.earlier()

    def tell(text: str) -> None:
        out.print(f"[dim]{time.monotonic() - began:6.1f} s[/dim]  {text}")

    def after() -> None:
        document.write(before, bench.results, plan, bench.facts, bench.failed)

    bench = Bench(plan, Results(run=document.now()), tell, after)
    bench.run()
    written = document.write(before, bench.results, plan, bench.facts, bench.failed)
    out.print(_table(written["targets"]))
    out.print(f"Written: {document.RESULT} and {document.PAGE}")
    for failed in bench.failed:
        out.print(f"[red]Not measured:[/red] {failed}")
    return 1 if bench.failed else 0


def _table(targets: list[dict[str, Any]]) -> Table:
    table = Table(title="What it must show")
    for heading in ("goal", "value", "met"):
        table.add_column(heading)
    for row in targets:
        values = [f"{name}: {value}" for name, value in row["value"].items()]
        table.add_row(row["goal"], "\n".join(values), MARKS[row["met"]])
    return table


if __name__ == "__main__":
    sys.exit(main())
