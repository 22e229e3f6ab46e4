"""How much of a container's files a snapshot may hold: whoever writes them pays, not the node.

Every name costs root memory and time at the capture, and at every restore: so each part of a
snapshot (see `shim.contract.manifest`) is bounded in all that a container can make many or long.
Beyond a limit there is no snapshot, and its source goes on serving. Lean.
"""

from __future__ import annotations

MAX_ENTRIES = 100_000
"""Files, directories and links of one part."""
MAX_DEPTH = 200
"""Of directories in one part."""
MAX_PATH_BYTES = 3800
"""Of the directories that a name is in, beneath its part: with the name it is within PATH_MAX."""
MAX_SHM_ENTRIES = 10_000
"""In /dev/shm, which is copied while its container is frozen."""
MAX_OPENED = 65_536
"""Descriptors and mapped files of all processes: a capture has a kilobyte of each in memory."""
MAX_LISTING_BYTES = 64 << 20
"""Of the listing of one part: see `shim.integrity.tree`."""
ENTRY_BYTES = 1024
"""Counted for each entry beside its blocks: an inode, its name, its line in the listing."""
MAX_SPEC_BYTES = 4 << 20
"""Of a container's OCI spec as containerd keeps it. Linux takes arguments of 2 MiB by default."""


class TooMuch(ValueError):
    """A container has more of something than a snapshot may hold. The message says how much."""

    def __init__(self, about: str, most: int) -> None:
        super().__init__(f"{about}: a snapshot holds {most} at most")
