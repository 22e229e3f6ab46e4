"""Measures the limits of the machine, by the program `filling` in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shim.kernel.meminfo import available_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.bench.result import Results

LIMIT: Final = "limit"
MACHINE: Final = "machine"
PROGRAM: Final = Path(__file__).parent / "filling.py"
FILE_BYTES: Final = 1 << 30
RESERVE_BYTES: Final = 3 << 30
"""A touch leaves this much to everything else."""
THREADS: Final = (1, 2)


def run(*arguments: object) -> float:
    """Run the program. Returns the bytes per second that it prints. Raises CalledProcessError."""
    command = [sys.executable, "-IS", str(PROGRAM), *map(str, arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def touch(wanted_bytes: int, *, huge: bool = False) -> int:
    """Touch as much memory as will be used: in a virtual machine the first touch is slow.

    huge: touch the same amount again by huge pages. Returns the bytes touched by pages: at most as
    much as the machine has to spare.
    """
    kinds = 1 + huge
    # Whole chunks, so that no chunk has both kinds.
    length = min(wanted_bytes, (available_bytes() - RESERVE_BYTES) // kinds) >> 22 << 22
    if length > 0:
        run("touch", length, length * huge)
    return max(length, 0)


def fill(file: Path, length: int, threads: int) -> dict[str, float]:
    """Measure how fast fresh memory of `length` bytes is filled from `file`. Returns a metric."""
    touch(length + length // 8)
    return {f"fill_{threads}_bytes_per_s": run("fill", file, length, threads)}


def measure(
    place: Path, length: int, runs: int, results: Results, tell: Callable[[str], None]
) -> None:
    """Fill `length` bytes with one and two threads by turns, and read the disk, `runs` times.

    place: a directory of the disk on which snapshots are.
    """
    file = place / "limit.data"
    block = os.urandom(1 << 20)
    try:
        with file.open("wb") as out:
            for number in range(FILE_BYTES >> 20):
                out.write(number.to_bytes(8, "little") + block[8:])
            out.flush()
            os.fsync(out.fileno())
        for _ in range(runs):
            found: dict[str, float] = {}
            for n in THREADS:
                found |= fill(file, length, n)
            found |= {f"disk_{n}_bytes_per_s": run("read", file, n) for n in THREADS}
            results.add(LIMIT, MACHINE, LIMIT, **found)
            rates = ", ".join(f"{name[:6]} {rate / 1e9:.2f} GB/s" for name, rate in found.items())
            tell(f"limit: {rates}")
    finally:
        file.unlink(missing_ok=True)
