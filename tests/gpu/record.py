"""The findings: a JSON file, complete after each finding, and a table for people."""

import json
import os
import time
from pathlib import Path
from typing import Any


class Record:
    """Findings by part and name. A killed probe keeps what was put here."""

    def __init__(self, path: Path, part: str) -> None:
        self._path, self._part = path, part
        self._started = time.monotonic()

    def put(self, name: str, finding: Any) -> None:
        """Written and renamed before this returns; also one line on standard output."""
        at_s = round(time.monotonic() - self._started, 1)
        known = read(self._path)
        known.setdefault(self._part, {})[name] = finding
        temporary = self._path.with_suffix(".new")
        temporary.write_text(json.dumps(known, indent=1))
        os.replace(temporary, self._path)
        print(f"[{self._part} {at_s:6.1f} s] {name}: {brief(finding)}", flush=True)


def read(path: Path) -> dict[str, Any]:
    """Everything so far; empty when there is nothing."""
    try:
        known: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return known


def brief(finding: Any, most: int = 300) -> str:
    """One line."""
    text = json.dumps(finding)
    return text if len(text) <= most else text[:most] + "..."


def table(path: Path) -> str:
    """Every figure that is a scalar or a short list, one a line, by part."""
    lines = []
    for part, findings in read(path).items():
        lines.append(f"== {part}")
        for name, finding in findings.items():
            lines += [f"  {key:<58} {value}" for key, value in flat(name, finding)]
    return "\n".join(lines)


def flat(name: str, finding: Any) -> list[tuple[str, str]]:
    """Dotted names and their values; long lists are only counted."""
    if isinstance(finding, dict):
        return [pair for key, value in finding.items() for pair in flat(f"{name}.{key}", value)]
    if isinstance(finding, list) and len(json.dumps(finding)) > 120:
        return [(f"{name}[{len(finding)}]", brief(finding[:1], 120))] if finding else []
    return [(name, brief(finding, 160))]
