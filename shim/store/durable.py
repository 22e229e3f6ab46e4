"""Writes small files that survive a power cut: either all of the new content is there, or none."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from shim.contract import faults
from shim.kernel import replace
from shim.kernel.beneath import open_dir

if TYPE_CHECKING:
    from pathlib import Path


def put(path: Path, data: bytes) -> None:
    """Write `data`, sync it, and put it in place with a single rename. Raises OSError.

    After a crash at any moment the file has the old content or the new content.
    """
    replace.put(str(path), data, is_durable=True, written=_written)
    faults.point("store.record.renamed")
    sync_directory(path.parent)


def _written() -> None:
    faults.point("store.record.written")


def take_away(path: Path) -> None:
    """Remove the file durably; a missing file is no error. Raises OSError."""
    if replace.take_away(str(path)):
        sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames and removals in the directory durable. Raises OSError."""
    with open_dir(str(directory)) as fd:
        os.fsync(fd.fileno())
