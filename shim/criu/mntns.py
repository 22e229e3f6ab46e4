"""What a restore that was killed leaves mounted. Lean.

CRIU's new tree in /tmp, its view of the cgroups in its work directory, runc's root.
"""

from __future__ import annotations

import contextlib
import os

from shim.kernel import mounts

_CGROUPS = ".criu.cg"
"""How the directories begin in which CRIU mounts cgroup hierarchies (v1): `yard`, `mounts`."""
_RUNC_ROOT = "criu-root"
_MAX_BYTES = 4 << 20


def remove(log: str, state: str) -> None:
    """Unmount and remove what the restore with this log left behind, if anything. Raises OSError.

    Only for a restore that has ended. state: where runc keeps the state of this container.
    """
    _remove(f"{state}/{_RUNC_ROOT}")
    with contextlib.suppress(OSError):
        os.rmdir(state)  # with something in it, it is the runtime's to remove
    if tree := _tree(log):
        _remove(tree)
    _remove_cgroups(os.path.dirname(log))


def _remove_cgroups(work: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(work):
            if name.startswith(_CGROUPS):
                _remove(f"{work}/{name}")


def _tree(log: str) -> str:
    """The first name in the log is CRIU's own: what the container mounts is logged later."""
    import re  # late: only for what was killed

    try:
        with open(log, "rb") as file:
            content = file.read(_MAX_BYTES)
    except FileNotFoundError:
        return ""
    found = re.search(rb"(/tmp/\.criu\.mntns\.[A-Za-z0-9]{6})/mnt-", content)
    return os.fsdecode(found[1]) if found else ""


def _remove(directory: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        if os.path.ismount(directory):
            mounts.unmount(directory, detach=True)
        os.rmdir(directory)
