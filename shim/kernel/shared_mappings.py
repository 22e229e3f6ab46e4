"""Finds files that processes can change without a system call: shared, writable mappings."""

from __future__ import annotations

import contextlib

from shim.kernel import procfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


def writable_shared_files(pids: Iterable[int]) -> set[str]:
    """Returns the paths, as the processes see them, of files mapped MAP_SHARED and writable.

    A process that has died meanwhile has none. Source: proc_pid_maps(5).
    """
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for area in procfs.areas(pid, b"s "):
                if area.rights[1:4:2] == b"ws" and area.name.startswith(b"/"):
                    found.add(area.path)
    return found
