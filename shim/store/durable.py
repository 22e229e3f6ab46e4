"""Small files that survive a power cut: there with all of their content, or not there."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from shim.contract import faults
from shim.kernel.beneath import open_dir

if TYPE_CHECKING:
    from pathlib import Path

SCRATCH = ".new"
"""Ending of a file that is not finished. Who finds one may remove it."""


def put(path: Path, data: bytes) -> None:
    """Write `data`, sync it, and put it in place with one rename. Raises OSError.

    After a crash at any moment the file has the old content or the new one.
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
    """Remove the file for good; it is no error when there is none. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
        sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make what was renamed or removed in the directory survive. Raises OSError."""
    with open_dir(str(directory)) as fd:
        os.fsync(fd.fileno())
