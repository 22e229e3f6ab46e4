"""`make bench`: cold start, runc's restore, podman's import and quickthaw, side by side.

Writes build/bench.json and build/bench.html. What an earlier run has measured and this one does
not stays in them. The exit status is 1 when something could not be measured, 2 for a wrong plan;
a target that is missed is told, and no failure.
"""

import json
import os
import sys
import time
from typing import Final

from rich.console import Console

from tests.bench.parts import Bench
from tests.bench.plan import Plan, WrongPlan
from tests.bench.result import Results
from tests.node.base import BUILD

RESULT: Final = BUILD.parent / "bench.json"


def main() -> int:
    """Returns the exit status."""
    out = Console(highlight=False, soft_wrap=True)
    try:
        plan = Plan.of(os.environ)
    except WrongPlan as error:
        out.print(f"[red]{error}[/red]")
        return 2
    began = time.monotonic()

    def tell(text: str) -> None:
        out.print(f"[dim]{time.monotonic() - began:6.1f} s[/dim]  {text}")

    bench = Bench(plan, Results(), tell)
    try:
        bench.run()
    finally:
        out.print(json.dumps(bench.results.as_json()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
