"""Takes the levels that must not grow while pods come and go, and judges whether they did.

A level is taken between two cycles, when no pod of the soak exists. A resource that is still going
away at that moment makes a level too high once, never too low: so windows are compared by their
lowest.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shim.kernel import procfs
from tests.node.node import Node
from tests.node.swapping import RUN

STORE: Final = "/var/lib/quickthaw"
WARM_UP: Final = 50
"""Cycles after which everything must be flat: caches are filled, modules are imported."""
WINDOW: Final = 25
"""The number of levels that are compared on either side."""
LEAST: Final = 50
"""Fewer cycles prove nothing: a leak of one object in ten cycles would not be found."""

ALLOWED: Final = {
    "daemon_memory_kib": 1024,  # the allocator's own ups and downs: about 1 KiB in a cycle
    "store_kib": 64,  # directories of ext4 do not shrink
}
"""How much a level may be higher at the end; without an entry, not at all."""

Levels = dict[str, int]


@dataclass(frozen=True, slots=True)
class Growth:
    """A level that is higher at the end than after the warm-up."""

    level: str
    was: int
    became: int
    allowed: int

    def __str__(self) -> str:
        return f"{self.level} grew from {self.was} to {self.became} (allowed: {self.allowed} more)"


def take(node: Node) -> Levels:
    """Returns the levels of a node on which no pod runs."""
    found = node.inventory()
    return {
        "daemon_fds": sum(1 for _ in procfs.descriptors(node.daemon_pid)),
        "daemon_threads": len(procfs.threads(node.daemon_pid)),
        "daemon_memory_kib": memory_kib(node.daemon_pid),
        "processes": sum(int(line.split(" x ")[0]) for line in found.processes),
        "mounts": len(found.mounts),
        "cgroups": len(found.cgroups),
        "network_namespaces": len(found.network_namespaces),
        "links": len(found.links),
        "files": len(found.files),
        "tickets": _count(node, f"{RUN}/tickets"),
        "run_files": _count(node, RUN),
        "store_kib": _disk_kib(node.path(STORE)),
    }


def grown(taken: Sequence[Levels]) -> list[Growth]:
    """Returns each level whose lowest value at the end is above the lowest after the warm-up.

    Raises ValueError when there are too few cycles to tell.
    """
    if len(taken) < LEAST:
        raise ValueError(f"{len(taken)} cycles are too few: {LEAST} or more")
    warm, window = warm_up(len(taken)), min(WINDOW, len(taken) // 4)
    first, last = taken[warm : warm + window], taken[-window:]
    found = []
    for level in taken[0]:
        was, became = (min(each[level] for each in part) for part in (first, last))
        allowed = ALLOWED.get(level, 0)
        if became > was + allowed:
            found.append(Growth(level, was, became, allowed))
    return found


def warm_up(cycles: int) -> int:
    """Returns the number of cycles that are not judged: of few cycles, the half."""
    return min(WARM_UP, cycles // 2)


def memory_kib(pid: int) -> int:
    """Returns the memory that the process has written itself, in KiB.

    Pages of files are left out: whether such a page counts as the process' own depends on other
    processes that have the file mapped, such as another node of this machine.
    """
    rollup = procfs.rollup(pid)
    return (rollup["Anonymous"] + rollup["Swap"]) >> 10


def _count(node: Node, directory: str) -> int:
    return sum(1 for _ in node.path(directory).rglob("*"))


def _disk_kib(directory: Path) -> int:
    paths = [directory, *directory.rglob("*")]
    return sum(path.lstat().st_blocks for path in paths) // 2


def as_json(taken: Sequence[Levels]) -> str:
    """Returns a column for each level, in the order of the cycles."""
    return json.dumps({level: [each[level] for each in taken] for level in taken[0]})
