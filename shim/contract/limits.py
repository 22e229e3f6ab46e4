"""Limits how many of a container's files a snapshot may hold, so that the node does not pay.

Every name costs root memory and time at the capture and at every restore. So we limit every
quantity in a part of a snapshot (see `shim.contract.manifest`) that a container can make many or
long. Beyond a limit there is no snapshot, and the source goes on serving. Lean.
"""

from __future__ import annotations

MAX_ENTRIES = 100_000
"""Files, directories and links in a part."""
MAX_DEPTH = 200
"""Nested directories in a part."""
MAX_PATH_BYTES = 3800
"""Length of a directory's path beneath its part: with a file name, the path is within PATH_MAX."""
MAX_SHM_ENTRIES = 10_000
"""In /dev/shm, which is copied while its container is frozen."""
MAX_OPENED = 65_536
"""Descriptors and mappings of all processes that a capture looks at: it has a kilobyte of each in
memory."""
MAX_LISTING_BYTES = 64 << 20
"""Size of the listing of a part: see `shim.integrity.tree`."""
ENTRY_BYTES = 1024
"""Counted for each entry beside its blocks: an inode, a name, a line in the listing."""
MAX_SPEC_BYTES = 4 << 20
"""Size of a container's OCI spec as containerd keeps it. Linux allows arguments of 2 MiB."""


class TooMuch(ValueError):
    """A container has more of something than a snapshot may hold. The message has the limit."""

    def __init__(self, about: str, most: int) -> None:
        super().__init__(f"{about}: a snapshot holds {most} at most")
