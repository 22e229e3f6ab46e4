"""Lists the objects of shared memory in CRIU's images: memfds, anonymous, System V segments.

CRIU numbers memfds and anonymous objects by inode, segments by their id; the number is in the name
of the image that lists an object's pages. T2: imports protobuf.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from protos import criu_pb2
from shim.criu.images import DamagedImage, entries, parsed
from shim.criu.pagemap import MAP_HUGETLB, PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LISTS: Final = "pagemap-shmem-*.img"
"""The images that list the pages of shared objects."""
_ANON_SHARED, _SEGMENT = 1 << 8, 1 << 10


@dataclass(frozen=True, slots=True)
class SharedObject:
    """An object of shared memory. shmid: CRIU's number. size: whole pages. is_huge: hugetlb."""

    shmid: int
    size: int
    is_huge: bool


def number_of(image: Path) -> int:
    """Returns the number of the object whose pages an image lists. Raises DamagedImage."""
    number = image.name.removeprefix("pagemap-shmem-").removesuffix(".img")
    if not number.isdecimal():
        raise DamagedImage(f"{image.name}: no number of a shared object in its name")
    return int(number)


def objects(directory: Path) -> dict[int, SharedObject]:
    """Returns the objects of a dump by number. Raises DamagedImage, OSError.

    A number of two objects is left out: a memfd may have the number of a System V segment.
    """
    found: dict[int, SharedObject] = {}
    twice = set()
    for each in [*_memfds(directory), *_segments(directory), *_anonymous(directory)]:
        if each.shmid in found:
            twice.add(each.shmid)
        found[each.shmid] = each
    return {shmid: each for shmid, each in found.items() if shmid not in twice}


def _memfds(directory: Path) -> Iterator[SharedObject]:
    path = directory / "memfd.img"
    for raw in entries(path) if path.exists() else ():
        inode = parsed(criu_pb2.MemfdInode, raw, path)
        yield SharedObject(inode.shmid, _whole(inode.size), bool(inode.hugetlb_flag))


def _segments(directory: Path) -> Iterator[SharedObject]:
    for path in sorted(directory.glob("ipcns-shm-*.img")):
        for raw in entries(path):
            segment = parsed(criu_pb2.IpcShm, raw, path)
            if not segment.in_pagemaps:
                raise DamagedImage(f"{path.name}: made by a CRIU that is too old")
            yield SharedObject(
                segment.desc.id, _whole(segment.size), bool(segment.hugetlb_flag)
            )  # fmt: skip


def _anonymous(directory: Path) -> Iterator[SharedObject]:
    """Yields anonymous objects, as large as the furthest of their mappings reaches."""
    sizes: dict[int, int] = {}
    huge = set()
    for path in sorted(directory.glob("mm-*.img")):
        for raw in entries(path):
            for vma in parsed(criu_pb2.Mm, raw, path).vmas:
                if vma.status & (_ANON_SHARED | _SEGMENT) == _ANON_SHARED:
                    reach = vma.pgoff + vma.end - vma.start
                    sizes[vma.shmid] = max(sizes.get(vma.shmid, 0), reach)
                    if vma.flags & MAP_HUGETLB:
                        huge.add(vma.shmid)
    for shmid, size in sizes.items():
        yield SharedObject(shmid, _whole(size), shmid in huge)


def _whole(size: int) -> int:
    return -(-size // PAGE) * PAGE
