"""Decides how much room snapshots may take, and which snapshots leave. Pure but for `disk`.

A snapshot that does not fit is not captured: its source goes on serving, and the next pod starts
cold.
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
    """The operator's limits. 0 in a limit called max_*: no limit of ours.

    namespace_percent: the share of a namespace in the room for snapshots; 0: an equal share for
    each namespace that has snapshots.
    """

    max_snapshot_bytes: int = 0
    max_store_bytes: int = 0
    keep_free_bytes: int = 0
    keep_free_percent: float = 0
    max_namespace_bytes: int = 0
    namespace_percent: float = 0


@dataclass(frozen=True, slots=True)
class Disk:
    """The file system of the store. inodes: 0 if the file system makes inodes on demand."""

    size_bytes: int
    free_bytes: int
    inodes: int = 0
    free_inodes: int = 0

    def kept(self, limits: Limits) -> int:
        """Returns how many bytes have to stay free: the larger of both limits."""
        return max(limits.keep_free_bytes, int(self.size_bytes * limits.keep_free_percent / 100))

    def kept_inodes(self, limits: Limits) -> int:
        """Returns how many inodes have to stay free: the same share."""
        return int(self.inodes * limits.keep_free_percent / 100)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A snapshot that nobody uses.

    last_use: unix time. useless: nobody can start from the snapshot. namespace: of Kubernetes.
    """

    id: str
    size_bytes: int
    last_use: float
    useless: bool = False
    namespace: str = ""
    entries: int = 0


@dataclass(frozen=True, slots=True)
class Excess:
    """The excess over a limit. size_bytes, inodes: 0 or less if all fits. why: names the limit."""

    size_bytes: int
    why: str
    inodes: int = 0

    @property
    def fits(self) -> bool:
        """Whether no snapshot has to leave."""
        return self.size_bytes <= 0 and self.inodes <= 0


def disk(directory: Path) -> Disk:
    """Returns the present state. Root's reserve does not count as free. Raises OSError."""
    found = os.statvfs(directory)
    free = found.f_bavail * found.f_frsize
    return Disk(found.f_blocks * found.f_frsize, free, found.f_files, found.f_favail)


def excess(
    limits: Limits,
    there: Disk,
    used_bytes: int,
    needed_bytes: int,
    new_bytes: int,
    new_inodes: int = 0,
) -> Excess:
    """Returns the excess over the limits of store and disk: the larger of the two.

    used_bytes: of all existing snapshots. needed_bytes: of snapshots that are being made.
    new_bytes, new_inodes: the part of needed_bytes, and its inodes, that is not on the disk yet.
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
    """The bytes that each namespace takes, and the share that a namespace may take of the room.

    used_bytes: by namespace. mine: the namespace of the snapshot that needs room. needed_bytes: the
    size of that snapshot.
    """

    mine: str = ""
    needed_bytes: int = 0
    share_bytes: int = 0
    used_bytes: Mapping[str, int] = field(default_factory=dict)

    def excess_bytes(self, namespace: str) -> int:
        """Returns by how many bytes a namespace exceeds its share."""
        needed = self.needed_bytes if namespace == self.mine else 0
        return max(0, self.used_bytes.get(namespace, 0) + needed - self.share_bytes)


def shares(
    limits: Limits, there: Disk, used_bytes: Mapping[str, int], mine: str, needed_bytes: int
) -> Shares:
    """Returns the shares in the room: the bytes that snapshots take now or may fill.

    used_bytes: by namespace; snapshots without a namespace have the empty name.
    """
    used = sum(used_bytes.values())
    room = used + max(0, there.free_bytes - there.kept(limits))
    if limits.max_store_bytes:
        room = min(room, limits.max_store_bytes)
    percent = limits.namespace_percent or 100 / len({*filter(None, used_bytes), mine})
    return Shares(mine, needed_bytes, int(room * percent / 100), used_bytes)


def victims(
    wanted_bytes: int,
    candidates: Iterable[Candidate],
    given: Shares | None = None,
    wanted_inodes: int = 0,
) -> list[Candidate] | None:
    """Returns the snapshots that have to leave to free the wanted room; None if all are not enough.

    Snapshots of the own namespace leave first. Another namespace loses useless snapshots, and the
    snapshots that it has beyond its share; but the latter only while the own namespace stays within
    its share. In both groups useless snapshots leave first, then the least recently used. No more
    leave than needed. given: None if all snapshots are of a single namespace.
    """
    given = given or Shares()
    beyond = {name: given.excess_bytes(name) for name in given.used_bytes if name != given.mine}
    is_modest = not given.excess_bytes(given.mine)
    chosen: list[Candidate] = []
    ours = (given.mine, "")  # a damaged snapshot: nobody knows its namespace, and nobody can use it
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
