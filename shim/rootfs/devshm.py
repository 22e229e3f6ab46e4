"""/dev/shm of a container, copied into a snapshot while the container is frozen.

An external mount that CRIU does not look into. Files that are unlinked but mapped are CRIU's
(ghost files). `shmfill` is the way back.
"""

from __future__ import annotations

import os
import time

from shim.contract.errors import ShmNotCopied
from shim.kernel.beneath import O_WALK, open_dir
from shim.kernel.fds import OwnedFd
from shim.rootfs.diff import CopyStats
from shim.rootfs.inode import O_SOURCE_DIR, Changed, Copier

_MAX_DEPTH = 100


def capture(shm_dirfd: int, target: str, *, container: str) -> CopyStats:
    """Copy what is in the directory `shm_dirfd` into the empty directory `target`.

    shm_dirfd: for example /proc/PID/root/dev/shm, opened. Sizes, holes, owners, modes, xattrs
    and times are kept, and hard links between the files. Nothing is synced. Raises ShmNotCopied.
    """
    began = time.monotonic()
    copier = Copier()
    try:
        with open_dir(target) as target_fd:
            _Capture(copier, target_fd.fileno()).directory(shm_dirfd, target_fd.fileno(), "")
    except (OSError, Changed, ValueError) as error:
        raise ShmNotCopied(
            f"cannot copy /dev/shm to {target}", container=container,
            why=f"{type(error).__name__}: {error}", do="See that the store has room.",
        ) from error  # fmt: skip
    return CopyStats(copier.files, copier.bytes, time.monotonic() - began, 0)


class _Capture:
    """One walk; remembers hard links."""

    def __init__(self, copier: Copier, root_dirfd: int) -> None:
        self._copier, self._root_dirfd = copier, root_dirfd
        self._links: dict[tuple[int, int], str] = {}

    def directory(self, source_dirfd: int, target_dirfd: int, path: str) -> None:
        if path.count("/") > _MAX_DEPTH:
            raise ValueError(f"directories deeper than {_MAX_DEPTH} in /dev/shm")
        with os.scandir(source_dirfd) as listing:
            entries = list(listing)
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                self._subdirectory(source_dirfd, entry.name, target_dirfd, path)
            else:
                self._file(source_dirfd, entry, target_dirfd, path)
        self._copier.copy_attributes(source_dirfd, target_dirfd)
        status = os.fstat(source_dirfd)
        os.utime(target_dirfd, ns=(status.st_atime_ns, status.st_mtime_ns))

    def _subdirectory(self, source_dirfd: int, name: str, target_dirfd: int, path: str) -> None:
        os.mkdir(name, 0o700, dir_fd=target_dirfd)
        with (
            OwnedFd(os.open(name, O_SOURCE_DIR, dir_fd=source_dirfd)) as source,
            OwnedFd(os.open(name, O_WALK, dir_fd=target_dirfd)) as target,
        ):
            self.directory(source.fileno(), target.fileno(), f"{path}{name}/")

    def _file(
        self, source_dirfd: int, entry: os.DirEntry[str], target_dirfd: int, path: str
    ) -> None:
        status = entry.stat(follow_symlinks=False)
        first = self._links.get((status.st_dev, status.st_ino))
        if first is not None:
            os.link(first, entry.name, src_dir_fd=self._root_dirfd, dst_dir_fd=target_dirfd,
                    follow_symlinks=False)  # fmt: skip
            return
        status = self._copier.copy(source_dirfd, entry.name, target_dirfd)
        if status.st_nlink > 1:
            self._links[status.st_dev, status.st_ino] = path + entry.name
