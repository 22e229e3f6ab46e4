"""Who uses a snapshot, or is about to: such a one is neither removed nor evicted."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from shim.contract import ticket
from shim.contract.errors import TicketUnreadable
from shim.contract.paths import SNAPSHOTS, TICKETS
from shim.daemon.registry import State
from shim.kernel.mounts import read_mounts

if TYPE_CHECKING:
    from shim.contract.manifest import Manifest
    from shim.daemon.registry import Registry


def with_diff_mounted() -> dict[str, list[str]]:
    """The containers whose root file system has the diff of a snapshot, by snapshot.

    From the kernel's own list, so that a container counts which this daemon never saw.
    """
    found: dict[str, list[str]] = {}
    for mount in read_mounts():
        if mount.fstype != "overlay" or f"{SNAPSHOTS}/" not in mount.super_options:
            continue
        for part in mount.super_options.split(f"{SNAPSHOTS}/")[1:]:
            found.setdefault(part[:64], []).append(mount.target.split("/")[-2][:12])
    return found


def users(registry: Registry) -> dict[str, list[str]]:
    """The containers that use a snapshot or have a ticket for it, by snapshot."""
    found = with_diff_mounted()
    for tracked in registry:
        if tracked.state == State.RESTORING:
            found.setdefault(tracked.snapshot, []).append(tracked.container[:12])
    for name in os.listdir(TICKETS):
        container = name.removesuffix(".json")
        try:
            snapshot = ticket.read(container).snapshot
        except TicketUnreadable:
            continue  # nobody will start from it
        if container[:12] not in found.setdefault(snapshot, []):
            found[snapshot].append(container[:12])
    return found


def is_wanted(registry: Registry, found: Manifest) -> bool:
    """Whether a pod that exists asks for this one: it cannot have another in its place."""
    for tracked in registry:
        wanted = tracked.wish.restore
        digits = wanted.removeprefix("sha256:")
        by_name = bool(found.name) and wanted == found.name
        by_id = digits != wanted and found.id.startswith(digits)
        if (by_name and tracked.pod.namespace == found.source.namespace) or by_id:
            return True
    return False
