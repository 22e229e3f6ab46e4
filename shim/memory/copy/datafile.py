"""Writes the files of a snapshot's `memory/`: data files and their lists. Blocking."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from shim.kernel.filesystem import punch_hole
from shim.memory import layout

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from shim.memory.extents import Extent

_COPY_BYTES = 64 << 20


def keep_only(fd: int, kept: Iterable[Extent]) -> None:
    """Free all of a data file that is in none of the extents. Raises OSError."""
    at = 0
    for offset, size in sorted((offset, end - start) for start, end, offset in kept):
        if at < offset:
            punch_hole(fd, at, offset - at)
        at = offset + size
    os.truncate(fd, at)


def write_small(path: Path, content: bytes) -> None:
    """Write a small file, for root only. Raises OSError."""
    path.write_bytes(content)
    path.chmod(0o600)


def write_ranges(path: Path, extents: Iterable[Extent]) -> None:
    """Write the file of ranges beside a data file. Raises OSError."""
    write_small(path, layout.encode_ranges(extents))


def copy_range(source: int, offset: int, target: int, to: int, size: int) -> None:
    """Copy a part of a file into another. Raises ValueError if the source ends early; OSError."""
    while size:
        done = os.copy_file_range(source, target, min(size, _COPY_BYTES), offset, to)
        if not done:
            raise ValueError("the copy of the memory ends before its pages do")
        offset, to, size = offset + done, to + done, size - done
