"""Files of a snapshot's `memory/`: what is kept in one of data, and its list. Blocking."""

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
    """Free everything in a file of data that is in none of the extents. Raises OSError."""
    at = 0
    for offset, size in sorted((offset, end - start) for start, end, offset in kept):
        if at < offset:
            punch_hole(fd, at, offset - at)
        at = offset + size
    os.truncate(fd, at)


def write_small(path: Path, content: bytes) -> None:
    """A file that is read as a whole, root's alone. Raises OSError."""
    path.write_bytes(content)
    path.chmod(0o600)


def write_ranges(path: Path, extents: Iterable[Extent]) -> None:
    """The file of ranges beside one of data. Raises OSError."""
    write_small(path, layout.encode_ranges(extents))


def copy_range(source: int, offset: int, target: int, to: int, size: int) -> None:
    """Copy a part of one file into another. Raises ValueError when the first ends; OSError."""
    while size:
        done = os.copy_file_range(source, target, min(size, _COPY_BYTES), offset, to)
        if not done:
            raise ValueError("the copy of the memory ends before its pages do")
        offset, to, size = offset + done, to + done, size - done
