"""Removes the mounts that a killed restore left behind. Lean.

CRIU's new tree in /tmp, its view of the cgroups in its work directory, runc's root.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time

from shim.kernel import mounts, procfs

_CGROUPS = ".criu.cg"
"""The prefix of directories where CRIU mounts cgroup hierarchies (v1): `yard`, `mounts`."""
_RUNC_ROOT = "criu-root"
_MAX_BYTES = 4 << 20
_TREES, _TREE = "/tmp", ".criu.mntns."
_UNUSED_S = 1.0
"""A directory that was mounted nowhere for this long belongs to no restore in progress."""


def remove(log: str, state: str, *, is_brief: bool = False) -> None:
    """Unmount and remove what the restore with this log left behind, if anything. Raises OSError.

    Only for a restore that has ended. state: the directory in which runc keeps the state of this
    container. is_brief: the log has no notes; then every such directory is removed that no process
    uses.
    """
    mounts.remove_mount_point(f"{state}/{_RUNC_ROOT}")
    with contextlib.suppress(OSError):
        os.rmdir(state)  # if the directory is not empty, the runtime removes it
    if tree := _tree(log):
        mounts.remove_mount_point(tree)
    elif is_brief:
        _remove_unused()
    _remove_cgroups(os.path.dirname(log))


def _remove_cgroups(work: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(work):
            if name.startswith(_CGROUPS):
                mounts.remove_mount_point(f"{work}/{name}")


def _tree(log: str) -> str:
    """Returns the path of CRIU's tree: the first in the log, before the container's mounts."""
    import re  # late: only for a killed restore

    try:
        with open(log, "rb") as file:
            content = file.read(_MAX_BYTES)
    except FileNotFoundError:
        return ""
    found = re.search(rb"(/tmp/\.criu\.mntns\.[A-Za-z0-9]{6})/mnt-", content)
    return os.fsdecode(found[1]) if found else ""


def _remove_unused() -> None:
    """Remove trees that no mount namespace has mounted: a running restore has mounted its own."""
    for name in os.listdir(_TREES):
        path = f"{_TREES}/{name}"
        with contextlib.suppress(FileNotFoundError):
            status = os.lstat(path)
            if not name.startswith(_TREE) or status.st_uid or not stat.S_ISDIR(status.st_mode):
                continue
            time.sleep(min(_UNUSED_S, max(0.0, status.st_ctime + _UNUSED_S - time.time())))
            if not _is_mounted_somewhere(path):
                mounts.remove_mount_point(path)


def _is_mounted_somewhere(path: str) -> bool:
    known = set()
    for pid in procfs.pids():
        with contextlib.suppress(OSError):  # the process has ended
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace in known:
                continue
            with open(f"/proc/{pid}/mountinfo", errors="surrogateescape", newline="\n") as file:
                if f" {path}" in file.read():
                    return True
            known.add(namespace)
    return False
