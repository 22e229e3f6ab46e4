"""The event stress test, as `make storm` runs it: its result is part of ours."""

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
    """Run it. Raises subprocess.CalledProcessError when it left no result."""
    RESULT.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.storm", "--seconds", str(seconds)]
    done = subprocess.run(command, check=False, timeout=seconds * 2 + SLACK_S)
    if not RESULT.exists():
        raise subprocess.CalledProcessError(done.returncode, command)
    found = json.loads(RESULT.read_text())
    figures = {name: float(found[name]) for name in ("seconds", "wrong_bytes", "hangs")}
    results.add(STORM, STORM, "quickthaw", **figures)
    tell(f"storm: {', '.join(f'{name} {value:g}' for name, value in figures.items())}")
