"""Images of pages that lead nowhere: CRIU lists the pages, and their content is taken elsewhere.

CRIU opens `pages-N.img` with O_CREAT and O_TRUNC (4.1 and 4.2, criu/image.c), so it follows a
symlink that has the name, and splices pages from a pipe into it: into /dev/null that costs next to
nothing. N counts from 1 in the order in which CRIU comes to processes and to objects of shared
memory.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from shim.criu import pagemap, sharedmem

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def make(directory: Path, numbers: Iterable[int]) -> None:
    """The images of pages with these numbers. Raises OSError."""
    for number in numbers:
        (directory / f"pages-{number}.img").symlink_to(os.devnull)


def of_processes(directory: Path) -> set[int]:
    """The numbers that processes had in a dump. Raises DamagedImage, OSError."""
    return {pagemap.pages_id(path) for path in directory.glob("pagemap-[0-9]*.img")}


def of_objects(directory: Path) -> dict[int, int]:
    """Those of objects of shared memory, by object. Raises DamagedImage, OSError."""
    return {
        sharedmem.number_of(path): pagemap.pages_id(path)
        for path in directory.glob(sharedmem.LISTS)
    }


def is_lost(directory: Path, number: int) -> bool:
    """Whether what CRIU wrote into the image went nowhere. Before `remove`."""
    return (directory / f"pages-{number}.img").is_symlink()


def remove(directory: Path) -> None:
    """Take away what leads nowhere. Raises OSError."""
    for path in directory.glob("pages-*.img"):
        if path.is_symlink():
            path.unlink()


def without_content(directory: Path) -> list[Path]:
    """The images that list pages of objects whose content is lost, after `remove`.

    Raises DamagedImage, OSError.
    """
    return [
        path
        for path in sorted(directory.glob(sharedmem.LISTS))
        if not (directory / f"pages-{pagemap.pages_id(path)}.img").exists()
    ]
