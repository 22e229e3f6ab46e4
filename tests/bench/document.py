"""Writes build/bench.json: the figures, the machine, and the targets."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from tests.bench import page
from tests.bench.result import Results
from tests.bench.targets import targets
from tests.node.base import BUILD

if TYPE_CHECKING:
    from pathlib import Path

    from tests.bench.plan import Plan

RESULT: Final = BUILD.parent / "bench.json"
PAGE: Final = BUILD.parent / "bench.html"


def now() -> str:
    """Returns the time in the form of the document."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def earlier() -> dict[str, Any]:
    """Returns the document of an earlier run, empty when it is missing or unreadable."""
    try:
        found: dict[str, Any] = json.loads(RESULT.read_text())
    except (OSError, ValueError):
        return {}
    return found


def write(
    before: dict[str, Any], results: Results, plan: Plan, facts: dict[str, str], failed: list[str]
) -> dict[str, Any]:
    """Write both files: this run's figures over an earlier run's. Returns the document."""
    known = results.over(Results.from_json(before.get("series", [])))
    document = {
        "made": now(),
        "machine": facts or before.get("machine", {}),
        "plan": asdict(plan),
        "failed": failed,
        "targets": targets(known),
        "series": known.as_json(),
    }
    _replace(RESULT, json.dumps(document, indent=1) + "\n")
    _replace(PAGE, page.of(document))
    return document


def _replace(path: Path, text: str) -> None:
    scratch = path.with_suffix(".part")
    scratch.write_text(text)
    os.replace(scratch, path)
