"""Keeps two kinds of private memory as they were: memory that a fork wipes, and droppable memory.

Random number generators rely on both. The vDSO's getrandom has its state in droppable memory, and
cryptographic libraries notice a fork by memory that reads as zeros in the child (MADV_WIPEONFORK).
A restore multiplies a process as a fork does: if the content came along, all replicas would draw
the same random numbers. So a snapshot has no content of such memory, the restored process finds
zeros, and the generators take a new seed from the kernel.

CRIU before 4.2 knows neither kind, and makes ordinary memory of both: then a forked child would
draw its parent's numbers, too. `complete` writes the flags into CRIU's image as CRIU 4.2 does,
because the restore of every version gives all advice that the image names. T2.

Sources: madvise(2), mmap(2), the kernel's lib/vdso/getrandom.c; CRIU, criu/proc_parse.c and
criu/pie/restorer.c.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from shim.criu import pagemap
from shim.kernel import smaps

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from shim.kernel.smaps import FlaggedArea

_MAP_PRIVATE, _MAP_DROPPABLE = 0x02, 0x08
_WIPE_ON_FORK = 1 << 18
"""MADV_WIPEONFORK, as a bit of the image's advice."""
_VERSION: Final = re.compile(r"(\d+)\.(\d+)")
_KNOWS: Final = (4, 2)


def is_known_to(version: str) -> bool:
    """Returns whether CRIU dumps both kinds as they are. version: as CRIU prints its own."""
    found = _VERSION.search(version)
    return found is not None and (int(found[1]), int(found[2])) >= _KNOWS


def complete(image: Path, areas: Iterable[FlaggedArea]) -> None:
    """Write the flags of a process's areas into its mm-PID.img.

    Raises ValueError if CRIU lists an area with other bounds; DamagedImage, OSError.
    """
    odd = [each for each in areas if each.flags & {smaps.WIPE_ON_FORK, smaps.DROPPABLE}]
    if not odd:
        return
    mm = pagemap.read_mm(image)
    by_bounds = {(vma.start, vma.end): vma for vma in mm.vmas}
    for each in odd:
        vma = by_bounds.get((each.start, each.end))
        if vma is None:
            raise ValueError(f"CRIU lists the memory at {each.start:#x} with other bounds")
        if smaps.WIPE_ON_FORK in each.flags:
            vma.madv |= _WIPE_ON_FORK
        if smaps.DROPPABLE in each.flags:
            vma.flags = vma.flags & ~_MAP_PRIVATE | _MAP_DROPPABLE
    pagemap.replace(image, [mm])


def wiped(image: Path) -> list[tuple[int, int]]:
    """Returns the areas in mm-PID.img whose content no snapshot may have, in order of addresses.

    Raises DamagedImage, OSError.
    """
    return [
        (vma.start, vma.end)
        for vma in pagemap.read_mm(image).vmas
        if vma.madv & _WIPE_ON_FORK or vma.flags & _MAP_DROPPABLE
    ]
