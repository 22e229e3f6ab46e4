"""What was verified since the node booted, and has not been touched since. Lean.

A mark is what a file's inode was when its content was hashed: device, number, size, modification
and change time. The change time cannot be set, so that a file with an equal mark has the content
that it had then. Marks are kept in /run/quickthaw/verified/SNAPSHOT, one file for each part, root
only, and end with the boot. They count only on file systems of this node itself: a server's
change times are what the server says.
"""

from __future__ import annotations

import contextlib
import os
import time

from shim.contract import jsontext
from shim.contract.paths import VERIFIED
from shim.integrity.tree import identity, raw
from shim.kernel import filesystem, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    Marks = dict[str, list[int]]
    """Path beneath the snapshot's directory to the identity of its inode."""

SETTLED_NS = 50_000_000
"""A file that was changed this shortly before it was hashed gets no mark: the clock of a file
system goes in steps of up to 10 ms, and a second change within one would not show."""
_COARSE_NS = 2_000_000_000
"""The same where change times have whole seconds only."""
_LOCAL = (filesystem.EXT4, filesystem.XFS, filesystem.BTRFS, filesystem.TMPFS)
_SCHEMA = 1


def count_on(snapshot_dirfd: int) -> bool:
    """Whether marks mean something on the file system of the snapshot. Raises OSError."""
    return filesystem.magic(snapshot_dirfd) in _LOCAL


def settled(status: os.stat_result, hashed_ns: int) -> bool:
    """Whether a later change would show. hashed_ns: Unix time before the content was read."""
    steps = SETTLED_NS if status.st_ctime_ns % 1_000_000_000 else _COARSE_NS
    return status.st_ctime_ns < hashed_ns - steps


def now_ns() -> int:
    """The clock that change times are taken from."""
    return time.time_ns()


def complete(found: Marks, entries: int) -> Marks:
    """`found`, marks of `entries` entries; none at all when one of them got no mark.

    What `first_changed` is not told of it cannot miss.
    """
    return found if len(found) == entries else {}


def read(snapshot: str, part: str, directory: str = VERIFIED) -> Marks:
    """The marks of one part; none when there is nothing readable."""
    try:
        with open(f"{directory}/{snapshot}/{part}", "rb") as file:
            found = jsontext.parse(file.read())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict) or found.get("schema") != _SCHEMA:
        return {}
    marks = found.get("marks")
    return marks if isinstance(marks, dict) else {}


def write(snapshot: str, part: str, marks: Mapping[str, object], directory: str = VERIFIED) -> None:
    """Replace the marks of one part. Raises OSError."""
    place = f"{directory}/{snapshot}"
    os.makedirs(place, 0o700, exist_ok=True)
    replace.put(f"{place}/{part}", jsontext.canonical({"schema": _SCHEMA, "marks": marks}))


def forget(snapshot: str, directory: str = VERIFIED) -> None:
    """Remove the marks of a snapshot that is gone. Raises OSError, not when there are none."""
    place = f"{directory}/{snapshot}"
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(place):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{place}/{name}")
        os.rmdir(place)


def first_changed(snapshot_dirfd: int, marks: Marks) -> str | None:
    """The first path whose inode is not as it was marked; None when all are.

    A name that came or went shows in the times of its directory, which is marked, too.
    """
    for path, mark in marks.items():
        try:
            status = os.stat(raw(path), dir_fd=snapshot_dirfd, follow_symlinks=False)
        except (OSError, ValueError):
            return path
        if list(identity(status)) != mark:
            return path
    return None
