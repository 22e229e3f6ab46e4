"""Measures the check of a snapshot: python3 -m tests.bench.integrity [--bytes N] [--entries N].

Three snapshots in a temporary directory: of a small process, with `--bytes` of memory, with
`--entries` files in its root file system. The ways of checking take turns, and medians are printed
as JSON, with the spread. Pages are in the page cache: the bench measures the check, not the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from tests.unit.snapshots import MIB, check, recorded

if TYPE_CHECKING:
    from collections.abc import Callable

    from shim.contract.manifest import Manifest

SMALL_IMAGES, SMALL_PAGES = 40, 12 * MIB
"""As in tests/workers/probe.py."""


def snapshot(place: Path, *, pages: int, files: int) -> Manifest:
    for part in ("criu", "rootfs", "shm"):
        (place / part).mkdir(parents=True)
    for number in range(SMALL_IMAGES):
        (place / f"criu/core-{number}.img").write_bytes(os.urandom(1500))
    block = os.urandom(MIB)
    with (place / "criu/pages-1.img").open("wb") as file:
        for number in range(pages // MIB):
            file.write(number.to_bytes(8, "little") + block[8:])
    for number in range(files):
        directory = place / f"rootfs/{number // 100}"
        directory.mkdir(exist_ok=True)
        (directory / f"file-{number}").write_bytes(b"%d" % number)
    return recorded(place)[0]


def medians(rounds: int, ways: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    """Returns the milliseconds of each way; the ways take turns."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            taken[name].append((time.perf_counter() - began) * 1000)
    return {
        name: {
            "median_ms": round(statistics.median(values), 3),
            "min_ms": round(min(values), 3),
            "max_ms": round(max(values), 3),
        }
        for name, values in taken.items()
    }


def with_threads(count: int, way: Callable[[], object]) -> Callable[[], object]:
    def limited() -> None:
        with mock.patch("shim.integrity.work.THREADS", count):
            way()

    return limited


def measured(place: Path, rounds: int, **size: int) -> dict[str, Any]:
    marks = place.parent / f"{place.name}.marks"
    manifest = snapshot(place, **size)
    time.sleep(0.1)
    check(place, manifest, marks)
    ways: dict[str, Callable[[], object]] = {"with marks": lambda: check(place, manifest, marks)}
    for count in sorted({1, 2, os.cpu_count() or 1}):
        name = f"hashed, {count} threads"
        ways[name] = with_threads(count, lambda: check(place, manifest))
    found: dict[str, Any] = dict(medians(rounds, ways))
    for name, times in found.items():
        if name != "with marks" and size["pages"]:
            times["gb_per_s"] = round(size["pages"] / times["median_ms"] / 1e6, 2)
    return found


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--bytes", type=int, default=1 << 30)
    asked.add_argument("--entries", type=int, default=100_000)
    asked.add_argument("--rounds", type=int, default=9)
    given = asked.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        place = Path(directory)
        found = {
            "small": measured(place / "small", 10 * given.rounds, pages=SMALL_PAGES, files=5),
            "large": measured(place / "large", given.rounds, pages=given.bytes, files=5),
            "many": measured(place / "many", 3, pages=0, files=given.entries),
        }
    found["peak_rss_mib"] = {"all": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
