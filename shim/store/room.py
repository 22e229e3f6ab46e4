"""How much the snapshots may take, and which of them make room for another. Pure but for `disk`.

What does not fit is not captured: its source goes on serving, and the next pod starts cold.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Limits:
    """What an operator allows. 0 of the first two: no limit of our own."""

    max_snapshot_bytes: int = 0
    max_store_bytes: int = 0
    keep_free_bytes: int = 0
    keep_free_percent: float = 0


@dataclass(frozen=True, slots=True)
class Disk:
    """The file system that the store is on."""

    size_bytes: int
    free_bytes: int

    def kept(self, limits: Limits) -> int:
        """How much of it has to stay free: the larger of both limits."""
        return max(limits.keep_free_bytes, int(self.size_bytes * limits.keep_free_percent / 100))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A snapshot that nobody uses. last_use: unix time. useless: nobody can start from it."""

    id: str
    size_bytes: int
    last_use: float
    useless: bool = False


@dataclass(frozen=True, slots=True)
class Excess:
    """size_bytes: how much too much it would be, 0 when it fits. why: which limit, for people."""

    size_bytes: int
    why: str


def disk(directory: Path) -> Disk:
    """What there is now. Free is what is so for everybody, not root's reserve. Raises OSError."""
    found = os.statvfs(directory)
    return Disk(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)


def excess(
    limits: Limits, there: Disk, used_bytes: int, needed_bytes: int, new_bytes: int
) -> Excess:
    """By how much the limits would be exceeded: of store and disk the one that lacks more.

    used_bytes: by all snapshots that exist. needed_bytes: of those that are being made.
    new_bytes: as much of that as is not on the disk yet.
    """
    found = Excess(0, "")
    if limits.max_store_bytes:
        over = used_bytes + needed_bytes - limits.max_store_bytes
        why = (
            f"all snapshots would take {used_bytes + needed_bytes} bytes, max_store_bytes is "
            f"{limits.max_store_bytes}"
        )
        found = max(found, Excess(over, why), key=_size)
    left, kept = there.free_bytes - new_bytes, there.kept(limits)
    why = (
        f"{max(0, left)} bytes of {there.size_bytes} would be left free, keep_free_* asks "
        f"for {kept}"
    )
    return max(found, Excess(kept - left, why), key=_size)


def _size(found: Excess) -> int:
    return found.size_bytes


def victims(wanted_bytes: int, candidates: Iterable[Candidate]) -> list[Candidate] | None:
    """Those that have to go so that `wanted_bytes` become free; None when all are not enough.

    What is useless goes first, then what was not used for the longest time. No more than needed.
    """
    chosen: list[Candidate] = []
    for each in sorted(candidates, key=lambda each: (not each.useless, each.last_use, each.id)):
        if wanted_bytes <= 0:
            break
        chosen.append(each)
        wanted_bytes -= each.size_bytes
    return chosen if wanted_bytes <= 0 else None
