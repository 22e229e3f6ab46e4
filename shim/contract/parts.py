"""Lists the parts of a snapshot: a row for each directory. Lean.

Code that treats all parts alike loops over PARTS; code about a single part names the part. A new
part is a row here, a size in the manifest, and a module that fills the directory.
"""

from __future__ import annotations

from shim.contract.paths import (
    LISTING_SUFFIX,
    SNAPSHOT_CRIU,
    SNAPSHOT_MEMORY,
    SNAPSHOT_ROOTFS,
    SNAPSHOT_SHM,
)

FIRST = "first"
"""Before the restore goes on: other containers of the pod see the content at once."""
READ = "read"
"""Before the restore goes on. The check keeps small files, which the restore uses from memory."""
BESIDE = "beside"
"""On threads, beside the next steps of the restore."""


class SnapshotPart:
    """A part of a snapshot.

    name: of its directory, and of the file with its marks. maker: the module that fills the
    directory in a capture. checked: the moment of the check, FIRST, READ or BESIDE.

    is_tree: a directory with whatever the container made; its names are the container's. flat: if
    not, a directory that has files alone, and this is their kind in messages. A tree has one seal,
    a flat directory a mark for each data file (see `shim.integrity.marks`). has_times: whether the
    listing has modification times. is_always_marked: whether a verified part has marks in any case.
    is_memory: whether all content becomes memory of the restored container; of criu/ the pages do.
    listing: the file beside the directory that lists the content (see `shim.integrity.tree`).
    """

    __slots__ = (
        "checked", "flat", "has_times", "is_always_marked", "is_memory", "is_tree", "listing",
        "maker", "name",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        *,
        maker: str,
        checked: str,
        flat: str = "",
        has_times: bool = True,
        is_always_marked: bool = True,
        is_memory: bool = False,
    ) -> None:
        self.name, self.listing, self.maker = name, f"{name}{LISTING_SUFFIX}", maker
        self.checked, self.is_tree, self.flat = checked, not flat, flat
        self.has_times, self.is_always_marked = has_times, is_always_marked
        self.is_memory = is_memory

    def __repr__(self) -> str:
        return f"SnapshotPart({self.name})"


CRIU = SnapshotPart(
    SNAPSHOT_CRIU, maker="shim.capture.checkpoint", checked=READ, flat="an image of CRIU's",
    has_times=False, is_always_marked=False,
)  # fmt: skip
"""CRIU's images. Nobody reads their times, and all of them may be small."""
ROOTFS = SnapshotPart(SNAPSHOT_ROOTFS, maker="shim.rootfs.diff", checked=BESIDE)
"""The writable layer."""
SHM = SnapshotPart(SNAPSHOT_SHM, maker="shim.shm.devshm", checked=FIRST, is_memory=True)
"""The files of /dev/shm."""
MEMORY = SnapshotPart(
    SNAPSHOT_MEMORY, maker="shim.memory.copy.memorycopy", checked=READ, flat="a file of memory",
    is_memory=True,
)  # fmt: skip
"""The memory that a page server fills, and device memory."""
PARTS = (CRIU, ROOTFS, SHM, MEMORY)
"""In the order of the manifest."""


def checked(when: str) -> list[SnapshotPart]:
    """Returns the parts whose check has the moment FIRST, READ or BESIDE."""
    return [part for part in PARTS if part.checked == when]
