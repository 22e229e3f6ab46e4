"""Removes all our state of a container: the end of every container's story.

`quickthaw-hook poststop` runs this, also while the daemon is away. The daemon runs this for
containers that never ran or whose end nobody saw. Idempotent.
"""

from __future__ import annotations

import contextlib
import os
import time

from shim.contract import journal, ticket
from shim.contract.errors import NoTurn
from shim.contract.paths import (
    CONTAINER_CRIU_CONF,
    CONTAINER_WORK,
    CONTAINERS,
    CONTROL,
    SWAPPED,
)
from shim.criu import mntns, options
from shim.kernel import mounts, replace
from shim.kernel.beneath import open_dir, remove_tree
from shim.restore import turns
from shim.shm import fill

_QUEUE_S = 1.0


def forget(container: str) -> None:
    """Undo an unfinished swap, and remove the container's files and its control directory.

    Raises OSError, or ValueError for a damaged journal, after doing as much as possible. Does
    nothing while a swap of the container is under way.
    """
    private = f"{CONTAINERS}/{container}"
    if journal.is_locked(private):
        return
    with contextlib.ExitStack() as steps:
        # Last in, first out: the journal is read before its directory is removed.
        steps.callback(_sweep_turns)
        steps.callback(_remove_tree, private)
        steps.callback(mounts.remove_mount_point, f"{CONTROL}/{container}")
        steps.callback(replace.take_away, f"{SWAPPED}/{container}")
        steps.callback(ticket.remove, container)
        steps.callback(_undo_unfinished, container)


def _sweep_turns() -> None:
    """Remove the turn's file of a swap that was killed together with its guard."""
    with contextlib.suppress(NoTurn):  # the restore that holds the queue removes dead files, too
        turns.sweep(until=time.monotonic() + _QUEUE_S)


def _undo_unfinished(container: str) -> None:
    seen = set()
    for kind, subject in journal.changes(journal.path_of(container)):
        if kind == journal.DONE:
            return  # /dev/shm is the pod's now, as it would be after a cold start
        seen.add(kind)
        if kind == journal.SHM and journal.SHM_UNDONE not in seen and isinstance(subject, dict):
            placed = journal.SHM_PLACED in seen
            fill.undo(subject["target"], subject["put"], container=container, placed=placed)
        if kind == journal.RUNTIME:
            private = f"{CONTAINERS}/{container}"
            mntns.remove(
                f"{private}/{CONTAINER_WORK}/restore.log", str(subject),
                is_brief=options.is_brief(f"{private}/{CONTAINER_CRIU_CONF}"),
            )  # fmt: skip
        # ROOTFS needs nothing: containerd unmounts the bundle's root file system by itself.


def _remove_tree(directory: str) -> None:
    """Remove a directory. First unmount all below it: the mounted content must stay."""
    for mount in reversed(mounts.read_mounts()):
        if mount.target.startswith(f"{directory}/"):
            mounts.unmount(mount.target, detach=True)
    parent, name = os.path.split(directory)
    with contextlib.suppress(FileNotFoundError), open_dir(parent) as containers:
        remove_tree(containers.fileno(), name)
