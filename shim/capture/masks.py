"""Empty tmpfs that runc puts over what a container must not see, as CRIU restores them. Blocking.

CRIU unpacks an archive into each tmpfs that it has mounted, also into an empty one: `tar` and
`gzip`, 3 ms of every restore. Into a file system of its kind `auto` it unpacks nothing, and mounts
it by its name. Source: CRIU, criu/filesystems.c and mount.c.
"""

from __future__ import annotations

import gzip
import io
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
