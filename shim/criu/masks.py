"""Changes the mounts by which runc masks paths of a container, for CRIU's restore. Blocking.

Over a file runc mounts the container's null device, from the tmpfs at the container's /dev. After a
restore runc tells CRIU to bind the node's own /dev/null there, and the container could change its
mode and owner. So this module makes these mounts such that CRIU restores them by itself, from the
container's /dev.

Over a directory runc mounts an empty tmpfs. CRIU unpacks an archive into each tmpfs that it has
mounted, also into an empty one: `tar` and `gzip`, 3 ms of every restore. Into a file system of its
kind `auto` CRIU unpacks nothing, and mounts it by its name. Sources: CRIU, criu/filesystems.c and
mount.c; runc, libcontainer/criu_linux.go, addMaskPaths.
"""

from __future__ import annotations

import gzip
import io
import os
import posixpath
import tarfile
import zlib
from typing import TYPE_CHECKING, Final

from protos import criu_pb2
from shim.criu import pagemap
from shim.criu.images import entries, parsed

if TYPE_CHECKING:
    from pathlib import Path

_TMPFS, _AUTO = 5, 16
_READ_ONLY: Final = 1
_NULL: Final = b"null"
_MUCH_BYTES = 4096
"""An archive of a single empty directory is smaller."""


def mount_bare(criu: Path) -> None:
    """Have CRIU mount the masks of the dump in `criu` without unpacking.

    Only masks that are read-only, empty, and like new. Raises DamagedImage, OSError.
    """
    for path in criu.glob("mountpoints-*.img"):
        mounts = [parsed(criu_pb2.Mount, raw, path) for raw in entries(path)]
        masks = {
            mount.root_dev for mount in mounts
            if _is_mask(mount) and _is_as_new(criu / f"tmpfs-dev-{mount.root_dev}.tar.gz.img")
        }  # fmt: skip
        for mount in mounts:
            if mount.root_dev in masks:
                mount.fstype, mount.fsname = _AUTO, "tmpfs"
        if masks:
            pagemap.replace(path, mounts)


def own_null(criu: Path) -> None:
    """Have CRIU bind the container's own null device over masked files.

    Raises ValueError for a mask from another place; DamagedImage, OSError.
    """
    for path in criu.glob("mountpoints-*.img"):
        mounts = [parsed(criu_pb2.Mount, raw, path) for raw in entries(path)]
        devices = {mount.root_dev for mount in mounts if _is_own_dev(mount)}
        masks = [mount for mount in mounts if _is_masked_file(mount)]
        for mount in masks:
            if mount.root_dev not in devices:
                raise ValueError(
                    f"{_place(mount)} is masked by a null device that is not of the container's "
                    "own /dev"
                )
            mount.ClearField("ext_key")
        if masks:
            pagemap.replace(path, mounts)


def _is_own_dev(mount: criu_pb2.Mount) -> bool:
    """Returns whether this is the tmpfs at /dev, which CRIU restores with its content."""
    is_dev = _place(mount) == "/dev" and mount.fstype == _TMPFS
    return is_dev and mount.root == b"/" and not mount.ext_key


def _is_masked_file(mount: criu_pb2.Mount) -> bool:
    """Returns whether runc would bind the node's null device here."""
    is_hidden = _place(mount).startswith(("/proc/", "/sys/"))
    return is_hidden and bool(mount.ext_key) and posixpath.basename(mount.root) == _NULL


def _place(mount: criu_pb2.Mount) -> str:
    return "/" + os.fsdecode(mount.mountpoint).removeprefix(".").strip("/")


def _is_mask(mount: criu_pb2.Mount) -> bool:
    return (
        mount.fstype == _TMPFS
        and bool(mount.sb_flags & _READ_ONLY)
        and not (mount.ext_key or mount.ext_mount or mount.with_plugin)
    )


def _is_as_new(archive: Path) -> bool:
    """Returns whether the archive has only a root directory with the rights of a new tmpfs."""
    try:
        if archive.stat().st_size > _MUCH_BYTES:
            return False
        content = gzip.decompress(archive.read_bytes())
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            members = tar.getmembers()
    except (FileNotFoundError, gzip.BadGzipFile, zlib.error, EOFError, tarfile.TarError):
        return False
    return [(each.name, each.mode, each.uid, each.gid, each.isdir()) for each in members] == [
        (".", 0o1777, 0, 0, True)
    ]
