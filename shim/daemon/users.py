"""Finds the containers that use a snapshot, or soon will: nobody removes such a snapshot."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from shim.contract import ticket
from shim.contract.errors import TicketUnreadable
from shim.contract.paths import SNAPSHOTS, TICKETS
from shim.daemon.registry import State
from shim.kernel.mounts import read_mounts

if TYPE_CHECKING:
    from shim.contract.manifest import Manifest
    from shim.daemon.registry import Registry


_DECIDED_WITHIN_S = 60.0
"""After this time kubelet has given up a CreateContainer."""


def with_diff_mounted() -> dict[str, list[str]]:
    """Returns the containers whose root file system has a snapshot's diff, by snapshot.

    Reads the kernel's own list, so that containers count which this daemon never saw.
    """
    found: dict[str, list[str]] = {}
    for mount in read_mounts():
        if mount.fstype != "overlay" or f"{SNAPSHOTS}/" not in mount.super_options:
            continue
        for part in mount.super_options.split(f"{SNAPSHOTS}/")[1:]:
            found.setdefault(part[:64], []).append(mount.target.split("/")[-2][:12])
    return found


def users(registry: Registry) -> dict[str, list[str]]:
    """Returns the containers that use a snapshot or have a ticket for it, by snapshot."""
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
    """Whether an existing container may still start from this snapshot, and from no other.

    Either the daemon will soon decide about the container, or the container was restored from the
    snapshot, and is to be restored again when kubelet restarts it. A container that only names the
    snapshot, which did not fit, keeps nothing.
    """
    now = time.monotonic()
    for tracked in registry:
        if tracked.state is State.RESTORED and tracked.wish.on_restart == "restore":
            if tracked.snapshot == found.id:
                return True
        elif tracked.state is State.CREATED and now - tracked.since < _DECIDED_WITHIN_S:
            wanted = tracked.wish.restore
            digits = wanted.removeprefix("sha256:")
            by_id = digits != wanted and found.id.startswith(digits)
            if (by_id or (found.name and wanted == found.name)) and (
                tracked.pod.namespace == found.source.namespace
            ):
                return True
    return False
