"""Where CRIU builds a mount namespace: a directory that stays behind when it is killed. Lean."""

from __future__ import annotations

import contextlib
import os
import re

from shim.kernel import mounts

_ROOT = re.compile(rb"(/tmp/\.criu\.mntns\.[A-Za-z0-9]{6})/mnt-")
_MAX_BYTES = 4 << 20


def remove(log: str) -> None:
    """Unmount and remove what the restore with this log left behind, if anything. Raises OSError.

    Only for a restore that has ended. The first name in the log is CRIU's own: what the container
    is called and what it mounts is logged later.
    """
    try:
        with open(log, "rb") as file:
            found = _ROOT.search(file.read(_MAX_BYTES))
    except FileNotFoundError:
        return
    if found is None:
        return
    directory = os.fsdecode(found[1])
    with contextlib.suppress(FileNotFoundError):
        if os.path.ismount(directory):
            mounts.unmount(directory, detach=True)
        os.rmdir(directory)
