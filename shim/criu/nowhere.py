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
    from collections.abc import Container
    from pathlib import Path


def make(directory: Path, count: int, real: Container[int]) -> None:
    """The first `count` images of pages, but for those in `real`. Raises OSError."""
    for number in range(1, count + 1):
        if number not in real:
            (directory / f"pages-{number}.img").symlink_to(os.devnull)


def lost(directory: Path) -> dict[int, int]:
    """Objects of shared memory whose content went nowhere, and the number of the image.

    Raises DamagedImage, OSError.
    """
    found = {
        sharedmem.number_of(path): pagemap.read(path).pages_id
        for path in directory.glob(sharedmem.LISTS)
    }
    return {
        number: image for number, image in found.items()
        if (directory / f"pages-{image}.img").is_symlink()
    }  # fmt: skip


def remove(directory: Path) -> None:
    """Take away what leads nowhere. Raises OSError."""
    for path in directory.glob("pages-*.img"):
        if path.is_symlink():
            path.unlink()


def without_content(directory: Path) -> list[Path]:
    """The images that list the pages of those objects, after `remove`. Raises as `lost`."""
    return [
        path
        for path in sorted(directory.glob(sharedmem.LISTS))
        if not (directory / f"pages-{pagemap.read(path).pages_id}.img").exists()
    ]
