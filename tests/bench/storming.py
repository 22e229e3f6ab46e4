"""Runs the event stress test as `make storm` does, and records its result."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Final

from tests.node.base import BUILD

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.bench.result import Results

STORM: Final = "storm"
RESULT: Final = BUILD.parent / "storm.json"
SLACK_S: Final = 300


def run(seconds: int, results: Results, tell: Callable[[str], None]) -> None:
    """Run the storm; with 0 seconds take the result of the last `make storm`.

    Raises subprocess.CalledProcessError when there is no result.
    """
    command = [sys.executable, "-m", "tests.storm", "--seconds", str(seconds)]
    code = 0
    if seconds:
        RESULT.unlink(missing_ok=True)
        code = subprocess.run(command, check=False, timeout=seconds * 2 + SLACK_S).returncode
    if not RESULT.exists():
        raise subprocess.CalledProcessError(code, command)
    levels = json.loads(RESULT.read_text()).values()
    figures = {
        name: sum(float(level[name]) for level in levels) for name in ("seconds", "wrong", "hangs")
    }
    results.add(STORM, STORM, "quickthaw", **figures)
    tell(f"storm: {', '.join(f'{name} {value:g}' for name, value in figures.items())}")
