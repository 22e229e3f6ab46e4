"""Finds files that processes can change without a system call: shared, writable mappings."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_FIELDS_BEFORE_PATH = 5


def writable_shared_files(pids: Iterable[int]) -> set[str]:
    """Returns the paths, as the processes see them, of files mapped MAP_SHARED and writable.

    A process that has died meanwhile has none. Source: proc_pid_maps(5).
    """
    found = set()
    for pid in pids:
        try:
            with open(f"/proc/{pid}/maps", errors="surrogateescape", newline="\n") as file:
                for line in file:
                    fields = line.rstrip("\n").split(None, _FIELDS_BEFORE_PATH)
                    if len(fields) > _FIELDS_BEFORE_PATH and fields[1][1:4:2] == "ws":
                        found.add(fields[_FIELDS_BEFORE_PATH])
        except OSError:
            continue
    return {path for path in found if path.startswith("/")}
