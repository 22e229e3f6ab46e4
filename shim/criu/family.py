"""Makes CRIU restore the memory that a child shares with its parent by forking.

CRIU lets a child inherit an area of the same addresses, and keeps each page that is equal, so that
the kernel goes on sharing the page until parent or child writes to it. For that CRIU itself must
read both pages: the parent's before it forks, and then the child's, to compare. The images contain
such a page only once: CRIU looks for a page that is marked PARENT in the images of an earlier dump,
in the directory `parent`, where each process has its own list of pages, and all lists can name the
same content. T2: imports protobuf.

Source: CRIU, criu/mem.c, check_cow_vmas and restore_priv_vma_content; criu/pagemap.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from google.protobuf.message import DecodeError

from protos import criu_pb2
from shim.criu import pagemap
from shim.criu.images import DamagedImage, entries

if TYPE_CHECKING:
    from pathlib import Path

    from shim.criu.pagemap import Pagemap

    Range = tuple[int, int]

PREFIX: Final = "parent-"
"""The prefix of images for the directory `parent`; a snapshot has a single directory."""
_PSTREE = "pstree.img"
_GROWS_DOWN, _MAP_SHARED = 0x100, 1


def parents(directory: Path) -> list[tuple[int, int]]:
    """Returns each process and its parent, parents first. Raises DamagedImage, OSError."""
    found = []
    try:
        for raw in entries(directory / _PSTREE):
            entry = criu_pb2.PstreeEntry.FromString(raw)
            found.append((entry.pid, entry.ppid))
    except DecodeError as error:
        raise DamagedImage(f"{_PSTREE}: {error}") from error
    return found


def inherited(directory: Path, parent: int, child: int) -> list[Range]:
    """Returns the areas that a child inherits and a page server may fill. Raises as `parents`."""
    of_parent = {
        (vma.start, vma.end): vma.flags & _GROWS_DOWN
        for vma in pagemap.lazy(directory / f"mm-{parent}.img")
    }
    return [
        (vma.start, vma.end)
        for vma in pagemap.lazy(directory / f"mm-{child}.img")
        if of_parent.get((vma.start, vma.end)) == vma.flags & _GROWS_DOWN
    ]


def align(directory: Path, parent: int, child: int) -> None:
    """Add empty entries to the parent's areas, so that CRIU finds all that the child inherits.

    CRIU goes through both lists side by side, and where the child has an area that the parent
    lacks, CRIU misses the next area that both have. So the parent's list gets an entry there, of no
    length and no kind: CRIU restores nothing for it. Raises as `parents`. Source: CRIU, criu/mem.c,
    prepare_cow_vmas_for.
    """
    path = directory / f"mm-{parent}.img"
    mm = pagemap.read_mm(path)
    there = {vma.start for vma in mm.vmas}
    new = [
        criu_pb2.Vma(
            start=vma.start, end=vma.start, pgoff=0, shmid=0, prot=0, flags=_MAP_SHARED, status=0,
            fd=-1,
        )
        for vma in pagemap.read_mm(directory / f"mm-{child}.img").vmas
        if vma.start not in there
    ]  # fmt: skip
    if new:
        vmas = sorted([*mm.vmas, *new], key=lambda vma: vma.start)
        del mm.vmas[:]
        mm.vmas.extend(vmas)
        pagemap.replace(path, [mm])


def write_parent(directory: Path, pid: int, listed: Pagemap) -> None:
    """Write the list of pages of a process in the earlier dump. Raises OSError."""
    path = directory / f"{PREFIX}pagemap-{pid}.img"
    path.write_bytes((directory / f"pagemap-{pid}.img").read_bytes())  # for its magic
    pagemap.write(path, listed)
    path.chmod(0o600)


def pages_of(directory: Path, pages_id: int) -> Path:
    """Returns the path of the pages that such lists name."""
    return directory / f"{PREFIX}pages-{pages_id}.img"
