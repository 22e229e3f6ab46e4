"""`make attacks`: runs every attack against nodes with the installed package, prints a table.

An attack is an end-to-end test with the marker `attack`, whose text describes the attack in a
sentence. The attack is held when its test passes, as the table and build/attacks.json show.

    SUITE=forky   forky, trixie, or both with a comma between them
    K=EXPR        only attacks that EXPR takes, as pytest -k

Exit status 1 when an attack was not held, or none was run.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import pytest
from rich.console import Console
from rich.table import Table

from tests.node.base import BUILD

RESULT: Final = BUILD.parent / "attacks.json"
SUITES: Final = ("forky", "trixie")
TESTS: Final = str(Path(__file__).parent / "node")


@dataclass(slots=True)
class Attack:
    """The outcome of an attack. `held`: the node, its pods and the source came to no harm."""

    text: str
    case: str
    test: str
    held: bool = True
    seconds: float = 0.0
    why_not: str = ""


class Attacks:
    """A pytest plugin that selects attacks alone, and records the end of each."""

    def __init__(self) -> None:
        self.found: dict[str, Attack] = {}

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        taken = [item for item in items if item.get_closest_marker("attack")]
        others = [item for item in items if not item.get_closest_marker("attack")]
        config.hook.pytest_deselected(items=others)
        items[:] = taken
        self.found = {
            item.nodeid: Attack(_text(item), _case(item.name), item.name) for item in taken
        }

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        attack = self.found.get(report.nodeid)
        if attack is None:  # deselected by -k, after us
            return
        attack.seconds = round(attack.seconds + report.duration, 2)
        if not report.passed and attack.held:
            attack.held = False
            attack.why_not = f"{report.when}: {_reason(report)}"

    def ran(self) -> Iterator[Attack]:
        """Yields the attacks that were carried out, in their order."""
        yield from (each for each in self.found.values() if each.seconds)


def _text(item: pytest.Item) -> str:
    marker = item.get_closest_marker("attack")
    assert marker is not None
    assert marker.args, f"{item.nodeid}: the marker `attack` needs a sentence"
    return str(marker.args[0])


def _case(name: str) -> str:
    """Returns the parameters of a test without the node's suite, "" when there are none."""
    parameters = name.partition("[")[2].rstrip("]").split("-")
    return "-".join(each for each in parameters if each not in SUITES)


def _reason(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(getattr(crash, "message", report.longrepr)).splitlines()[0][:300]


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="make attacks")
    parser.add_argument("--suite", default="forky")
    parser.add_argument("-k", dest="expression", default="")
    options = parser.parse_args()
    suites = " or ".join(options.suite.split(","))
    chosen = f"({suites})" + (f" and ({options.expression})" if options.expression else "")
    attacks = Attacks()
    began = time.monotonic()
    pytest.main(["-q", "-k", chosen, TESTS], plugins=[attacks])
    ran = list(attacks.ran())
    document = {
        "suites": options.suite.split(","),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - began, 1),
        "attacks": [asdict(each) for each in ran],
    }
    RESULT.write_text(json.dumps(document, indent=1) + "\n")
    out = Console(highlight=False)
    out.print(_table(ran))
    not_held = sum(not each.held for each in ran)
    out.print(
        f"{len(ran)} attacks, {not_held} not held, {document['seconds']} s; "
        f"written to {RESULT.relative_to(BUILD.parents[1])}"
    )
    return 1 if not_held or not ran else 0


def _table(ran: list[Attack]) -> Table:
    table = Table(title="Attacks")
    for heading in ("attack", "case", "outcome", "s"):
        table.add_column(heading, justify="right" if heading == "s" else "left", overflow="fold")
    for each in ran:
        outcome = "[green]held[/green]" if each.held else "[red]NOT HELD[/red]"
        table.add_row(each.text, each.case, outcome, f"{each.seconds:.1f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
