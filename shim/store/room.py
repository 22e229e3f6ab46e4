"""How much the snapshots may take, and which of them make room for another. Pure but for `disk`.

What does not fit is not captured: its source goes on serving, and the next pod starts cold.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Limits:
    """What an operator allows. 0 of the first two and of the namespace's: no limit of our own.

    namespace_percent: the share of one namespace in the room for snapshots; 0: an equal one for
    each namespace that has any.
    """

    max_snapshot_bytes: int = 0
    max_store_bytes: int = 0
    keep_free_bytes: int = 0
    keep_free_percent: float = 0
    max_namespace_bytes: int = 0
    namespace_percent: float = 0


@dataclass(frozen=True, slots=True)
class Disk:
    """The file system that the store is on. inodes: 0 where it makes them as they are needed."""

    size_bytes: int
    free_bytes: int
    inodes: int = 0
    free_inodes: int = 0

    def kept(self, limits: Limits) -> int:
        """How much of it has to stay free: the larger of both limits."""
        return max(limits.keep_free_bytes, int(self.size_bytes * limits.keep_free_percent / 100))

    def kept_inodes(self, limits: Limits) -> int:
        """How many of its inodes have to stay free: the same share."""
        return int(self.inodes * limits.keep_free_percent / 100)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A snapshot that nobody uses. last_use: unix time. useless: nobody can start from it.

    namespace: of Kubernetes.
    """

    id: str
    size_bytes: int
    last_use: float
    useless: bool = False
    namespace: str = ""
    entries: int = 0


@dataclass(frozen=True, slots=True)
class Excess:
    """size_bytes, inodes: how much too much it would be, 0 when it fits. why: which limit."""

    size_bytes: int
    why: str
    inodes: int = 0

    @property
    def fits(self) -> bool:
        """Whether nothing has to go."""
        return self.size_bytes <= 0 and self.inodes <= 0


def disk(directory: Path) -> Disk:
    """What there is now. Free is what is so for everybody, not root's reserve. Raises OSError."""
    found = os.statvfs(directory)
    free = found.f_bavail * found.f_frsize
    return Disk(found.f_blocks * found.f_frsize, free, found.f_files, found.f_favail)


def excess(
    limits: Limits, there: Disk, used_bytes: int, needed_bytes: int, new_bytes: int,
    new_inodes: int = 0,
) -> Excess:  # fmt: skip
    """By how much the limits would be exceeded: of store and disk the one that lacks more.

    used_bytes: by all snapshots that exist. needed_bytes: of those that are being made.
    new_bytes, new_inodes: as much of that as is not on the disk yet.
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
    found = max(found, Excess(kept - left, why), key=_size)
    inodes = there.kept_inodes(limits) - (there.free_inodes - new_inodes) if there.inodes else 0
    if inodes <= 0:
        return found
    return Excess(
        found.size_bytes,
        f"{max(0, there.free_inodes - new_inodes)} inodes of {there.inodes} would be left free, "
        f"keep_free_percent asks for {there.kept_inodes(limits)}",
        inodes,
    )


def _size(found: Excess) -> int:
    return found.size_bytes


@dataclass(frozen=True, slots=True)
class Shares:
    """What each namespace takes (used_bytes, by its name), and what one may take of the room.

    mine: the namespace that a snapshot is made for, needed_bytes: how much of it.
    """

    mine: str = ""
    needed_bytes: int = 0
    share_bytes: int = 0
    used_bytes: Mapping[str, int] = field(default_factory=dict)

    def excess_bytes(self, namespace: str) -> int:
        """How much more than its share a namespace takes."""
        needed = self.needed_bytes if namespace == self.mine else 0
        return max(0, self.used_bytes.get(namespace, 0) + needed - self.share_bytes)


def shares(
    limits: Limits, there: Disk, used_bytes: Mapping[str, int], mine: str, needed_bytes: int
) -> Shares:
    """The room is all that snapshots may take: what they have, and what may be filled.

    used_bytes: by namespace; what is of none has the empty name.
    """
    used = sum(used_bytes.values())
    room = used + max(0, there.free_bytes - there.kept(limits))
    if limits.max_store_bytes:
        room = min(room, limits.max_store_bytes)
    percent = limits.namespace_percent or 100 / len({*filter(None, used_bytes), mine})
    return Shares(mine, needed_bytes, int(room * percent / 100), used_bytes)


def victims(
    wanted_bytes: int, candidates: Iterable[Candidate], given: Shares | None = None,
    wanted_inodes: int = 0,
) -> list[Candidate] | None:  # fmt: skip
    """Those that have to go so that so much becomes free; None when all are not enough.

    Those of the own namespace go first. Of another one's goes what is useless, and what that
    namespace takes beyond its share, unless the own namespace would take more than its share. Of
    each kind what is useless goes first, then what was not used for the longest time. No more than
    needed. given: None where all are of one namespace.
    """
    given = given or Shares()
    beyond = {name: given.excess_bytes(name) for name in given.used_bytes if name != given.mine}
    is_modest = not given.excess_bytes(given.mine)
    chosen: list[Candidate] = []
    ours = (given.mine, "")  # nobody knows whose a damaged one is, and nobody can use it
    for each in sorted(candidates, key=lambda each: (each.namespace not in ours, *_use(each))):
        if wanted_bytes <= 0 and wanted_inodes <= 0:
            break
        if each.namespace != given.mine and not each.useless:
            if not is_modest or beyond.get(each.namespace, 0) <= 0:
                continue
            beyond[each.namespace] -= each.size_bytes
        chosen.append(each)
        wanted_bytes -= each.size_bytes
        wanted_inodes -= each.entries
    return chosen if wanted_bytes <= 0 and wanted_inodes <= 0 else None


def _use(each: Candidate) -> tuple[bool, float, str]:
    return not each.useless, each.last_use, each.id
