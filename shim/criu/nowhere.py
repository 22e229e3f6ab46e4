"""Images of pages that lead nowhere: CRIU lists the pages, and their content is taken elsewhere.

CRIU opens `pages-N.img` with O_CREAT and O_TRUNC (4.1 and 4.2, criu/image.c), so it follows a
symlink that has the name, and splices pages from a pipe into it: into /dev/null that costs next to
nothing. N counts from 1 in the order in which CRIU comes to processes and shared memory.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from shim.criu import pagemap

if TYPE_CHECKING:
    from collections.abc import Container
    from pathlib import Path


def make(directory: Path, count: int, real: Container[int]) -> None:
    """The first `count` images of pages, but for those in `real`. Raises OSError."""
    for number in range(1, count + 1):
        if number not in real:
            (directory / f"pages-{number}.img").symlink_to(os.devnull)


def lost(directory: Path) -> set[int]:
    """Images of shared memory whose content went nowhere. Raises DamagedImage, OSError."""
    found = {pagemap.read(path).pages_id for path in directory.glob("pagemap-shmem-*.img")}
    return {number for number in found if (directory / f"pages-{number}.img").is_symlink()}


def remove(directory: Path) -> None:
    """Take away what leads nowhere. Raises OSError."""
    for path in directory.glob("pages-*.img"):
        if path.is_symlink():
            path.unlink()
