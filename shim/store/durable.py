"""Writes small files that survive a power cut: either all of the new content is there, or none."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from shim.contract import faults
from shim.kernel.beneath import open_dir

if TYPE_CHECKING:
    from pathlib import Path

SCRATCH = ".new"
"""The ending of an unfinished file. Anybody may remove such a file."""


def put(path: Path, data: bytes) -> None:
    """Write `data`, sync it, and put it in place with a single rename. Raises OSError.

    After a crash at any moment the file has the old content or the new content.
    """
    scratch = path.with_name(path.name + SCRATCH)
    fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
    faults.point("store.record.written")
    os.rename(scratch, path)
    faults.point("store.record.renamed")
    sync_directory(path.parent)


def take_away(path: Path) -> None:
    """Remove the file durably; a missing file is no error. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
        sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames and removals in the directory durable. Raises OSError."""
    with open_dir(str(directory)) as fd:
        os.fsync(fd.fileno())
