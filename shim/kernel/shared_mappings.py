"""Finds files that processes can change without a system call: shared, writable mappings."""

from __future__ import annotations

import contextlib
import os

from shim.kernel import procfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from shim.kernel.procfs import Area

_LINE_FEED = rb"\012"


def writable_shared_files(pids: Iterable[int]) -> set[str]:
    """Returns the paths, as the processes see them, of files mapped MAP_SHARED and writable.

    A process that has died meanwhile has none. Source: proc_pid_maps(5).
    """
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for area in procfs.areas(pid, b"s "):
                if area.rights[1:4:2] == b"ws" and area.name.startswith(b"/"):
                    found.add(_path(pid, area))
    return found


def _path(pid: int, area: Area) -> str:
    r"""Returns the path of the file. `maps` has `\012` for a line feed in a name; links do not."""
    if _LINE_FEED in area.name:
        return os.readlink(f"/proc/{pid}/map_files/{area.map_file}")
    return area.path
