"""Makes CRIU write page content to /dev/null: we copy memory ourselves.

CRIU opens `pages-N.img` with O_CREAT and O_TRUNC (4.1 and 4.2, criu/image.c), so it follows a
symlink of that name, and splices pages from a pipe into the target: into /dev/null that costs next
to nothing. N counts from 1 in the order in which CRIU comes to processes and to objects of shared
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
    """Make the images of pages with these numbers lead to /dev/null. Raises OSError."""
    for number in numbers:
        (directory / f"pages-{number}.img").symlink_to(os.devnull)


def of_processes(directory: Path) -> set[int]:
    """Returns the numbers of the processes' pages in a dump. Raises DamagedImage, OSError."""
    return {pagemap.pages_id(path) for path in directory.glob("pagemap-[0-9]*.img")}


def of_objects(directory: Path) -> dict[int, int]:
    """Returns the number of each shared object's pages in a dump. Raises DamagedImage, OSError."""
    return {
        sharedmem.number_of(path): pagemap.pages_id(path)
        for path in directory.glob(sharedmem.LISTS)
    }


def is_lost(directory: Path, number: int) -> bool:
    """Whether CRIU wrote the content of this image to /dev/null. Call it before `remove`."""
    return (directory / f"pages-{number}.img").is_symlink()


def remove(directory: Path) -> None:
    """Remove the symlinks to /dev/null. Raises OSError."""
    for path in directory.glob("pages-*.img"):
        if path.is_symlink():
            path.unlink()


def without_content(directory: Path) -> list[Path]:
    """Returns the images that list pages of objects without content in the dump, after `remove`.

    Raises DamagedImage, OSError.
    """
    return [
        path
        for path in sorted(directory.glob(sharedmem.LISTS))
        if not (directory / f"pages-{pagemap.pages_id(path)}.img").exists()
    ]
