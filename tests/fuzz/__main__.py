"""`make fuzz`: runs every target for its share of the time, and prints a table of the results.

    python -m tests.fuzz [--minutes N] [--jobs N] [--only NAME] [--keep]

Finds are in build/fuzz/TARGET. --keep copies new, small inputs into the committed corpus.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.files import SCRATCH
from tests.fuzz.targets import TARGETS

CORPUS, BUILD = Path("tests/fuzz/corpus"), Path("build/fuzz")
_MAX_INPUT = 16 << 10
_KEPT_BYTES, _KEPT_FILES = 512, 12
"""Limits of the committed corpus, which every run of the tests replays."""
_DONE = re.compile(r"#(\d+)\s+DONE\s+cov: (\d+)")
_FIRST = re.compile(r"INITED cov: (\d+)")


@dataclass(frozen=True, slots=True)
class Ran:
    """The run of a target.

    edges, edges_before: our branches that were taken, at the end and by the corpus. new: inputs
    that took a branch in a new way. found: the inputs that ended the run.
    """

    name: str
    runs: int
    edges_before: int
    edges: int
    new: int
    found: tuple[str, ...]


def main() -> int:
    """Run the targets. Returns 1 when anything was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=15, help="of all targets together")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", choices=sorted(TARGETS), action="append")
    parser.add_argument("--keep", action="store_true")
    wanted = parser.parse_args()
    names = wanted.only or list(TARGETS)
    each_s = max(1, round(wanted.minutes * 60 / len(names)))
    with ThreadPoolExecutor(wanted.jobs) as jobs:
        rows = list(jobs.map(lambda name: _run(name, each_s), names))
    _print(rows)
    if wanted.keep:
        for name in names:
            _keep(name)
    return 1 if any(row.found for row in rows) else 0


def _run(name: str, seconds: int) -> Ran:
    grown, finds = BUILD / "corpus" / name, BUILD / name
    for directory in (grown, CORPUS / name):
        directory.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(finds, ignore_errors=True)
    finds.mkdir(parents=True)
    before = len(list(grown.iterdir()))
    arguments = [
        f"-max_total_time={seconds}", f"-artifact_prefix={finds}/", "-timeout=10",
        "-rss_limit_mb=768", f"-max_len={_MAX_INPUT}", "-print_final_stats=1",
        str(grown), str(CORPUS / name),
    ]  # fmt: skip
    told = _fuzzed(name, *arguments)
    (finds / "log").write_text(told)
    done, first = _DONE.search(told), _FIRST.search(told)
    found = sorted(path.name for path in finds.iterdir() if path.name != "log")
    if not done and not found:
        found = ["the target did not end well: see its log"]
    return Ran(
        name, int(done[1]) if done else 0, int(first[1]) if first else 0,
        int(done[2]) if done else 0, len(list(grown.iterdir())) - before, tuple(found),
    )  # fmt: skip


def _fuzzed(name: str, *arguments: str) -> str:
    with tempfile.TemporaryDirectory(prefix="quickthaw-fuzz-", dir="/dev/shm") as scratch:
        ended = subprocess.run(
            [sys.executable, "-m", "tests.fuzz.one", name, *arguments],
            env={**os.environ, SCRATCH: scratch}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    return ended.stdout.decode(errors="replace")


def _keep(name: str) -> None:
    """Copy some inputs that took a new branch, of all sizes that are small enough to commit."""
    grown = BUILD / "corpus" / name
    sizes = sorted((path.stat().st_size, path.name) for path in grown.iterdir())
    small = [found for size, found in sizes if size <= _KEPT_BYTES]
    for found in small[:: -(-len(small) // _KEPT_FILES) or 1]:
        shutil.copy(grown / found, CORPUS / name / found)


def _print(rows: list[Ran]) -> None:
    print(f"{'target':<18}{'runs':>10}{'edges':>7}{'before':>8}{'new':>6}  found")
    for row in rows:
        found = ", ".join(row.found) or "-"
        print(
            f"{row.name:<18}{row.runs:>10}{row.edges:>7}{row.edges_before:>8}{row.new:>6}  {found}"
        )
    print(f"{'together':<18}{sum(row.runs for row in rows):>10}")


if __name__ == "__main__":
    sys.exit(main())
