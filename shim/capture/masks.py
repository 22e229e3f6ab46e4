"""What runc puts over what a container must not see, as CRIU restores it. Blocking.

Over a file it is the container's null device, bound from the tmpfs at its /dev. runc tells CRIU to
bind the node's own /dev/null there after a restore, whose mode and owner the container could then
change. So these mounts become ones that CRIU restores by itself, from the container's /dev.

Over a directory it is an empty tmpfs. CRIU unpacks an archive into each tmpfs that it has mounted,
also into an empty one: `tar` and `gzip`, 3 ms of every restore. Into a file system of its kind
`auto` it unpacks nothing, and mounts it by its name. Sources: CRIU, criu/filesystems.c and mount.c;
runc, libcontainer/criu_linux.go, addMaskPaths.
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
"""An archive of one empty directory is smaller."""


def mount_bare(criu: Path) -> None:
    """Have CRIU mount those of the dump in `criu` without unpacking. Raises DamagedImage, OSError.

    Only what is read-only, empty, and as a new one is.
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

    Raises ValueError when one of them is not from there; DamagedImage, OSError.
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
    """Whether it is the tmpfs at /dev, which CRIU restores with what is in it."""
    is_dev = _place(mount) == "/dev" and mount.fstype == _TMPFS
    return is_dev and mount.root == b"/" and not mount.ext_key


def _is_masked_file(mount: criu_pb2.Mount) -> bool:
    """Whether runc would have the node's null device bound here."""
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
    """Whether there is nothing in it but the root, with the rights that a new one has."""
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
