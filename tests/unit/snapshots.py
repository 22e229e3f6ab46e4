"""Snapshots for tests as they lie in a store, small, with one of each kind of file."""

from __future__ import annotations

import contextlib
import math
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from shim.integrity.check import SnapshotCheck
from shim.integrity.record import record
from shim.kernel.beneath import open_dir
from shim.kernel.stopping import Stop
from tests.unit.manifests import made

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shim.contract.manifest import Manifest
    from shim.integrity.record import Recorded

MIB = 1 << 20
ODD_NAME = b"no-utf8-\xff\xfe\n"


def make_parts(place: Path) -> None:
    """Makes criu/, rootfs/ and shm/ in the directory `place`."""
    for part in ("criu", "rootfs/etc/deep", "shm"):
        (place / part).mkdir(parents=True)
    (place / "criu/inventory.img").write_bytes(b"inventory")
    (place / "criu/files.img").write_bytes(b"files")
    (place / "criu/pages-1.img").write_bytes(os.urandom(5 * MIB - 1) + b"x")
    etc = place / "rootfs/etc"
    (etc / "motd").write_text("hello")
    (etc / "deep/empty").touch()
    os.setxattr(etc / "motd", "user.note", b"a note")
    os.link(etc / "motd", etc / "same")
    (etc / "link").symlink_to("motd")
    os.mkfifo(etc / "fifo")
    Path(os.fsdecode(bytes(etc) + b"/" + ODD_NAME)).write_text("odd")
    os.mknod(etc / "socket", stat.S_IFSOCK | 0o644)
    os.mknod(etc / "gone", 0o020000, os.makedev(0, 0))  # a whiteout
    (place / "rootfs/sparse").write_bytes(b"")
    os.truncate(place / "rootfs/sparse", 9 * MIB + 1)
    (place / "shm/segment").write_bytes(b"s" * 100)


def recorded(place: Path) -> tuple[Manifest, Recorded]:
    """Writes the listings into `place`, and not the manifest."""
    with open_dir(str(place)) as directory:
        found = record(directory.fileno(), Stop())
    return made(files=found.files), found


def check(place: Path, manifest: Manifest, marks: Path | None = None) -> SnapshotCheck:
    """Check the snapshot to its end. marks: the directory with the marks; without it no mark spares
    a check.

    Raises SnapshotNotWhole.
    """
    with checking(place, manifest, marks) as found:
        found.begin()
        found.finish()
        found.unchanged()
        return found


@contextlib.contextmanager
def checking(
    place: Path, manifest: Manifest, marks: Path | None = None, *, until: float = math.inf
) -> Iterator[SnapshotCheck]:
    """Yields a check that has not begun."""
    with (
        open_dir(str(place)) as directory,
        SnapshotCheck(
            directory.fileno(), manifest, container="c1", until=until, with_marks=marks is not None,
            marks_directory=str(marks or place.parent / "unused marks"),
        ) as found,
    ):  # fmt: skip
        yield found
