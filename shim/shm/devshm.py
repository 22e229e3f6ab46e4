"""Copies a container's /dev/shm into a snapshot: big files before the freeze, the rest in it.

/dev/shm is an external mount, into which CRIU does not look. CRIU keeps unlinked but mapped files
as ghost files. `fill` does the reverse.
"""

from __future__ import annotations

import contextlib
import os
import stat
from itertools import islice
from typing import TYPE_CHECKING, Protocol, Self

from shim.contract.errors import ShmNotCopied, too_big
from shim.contract.limits import MAX_SHM_ENTRIES, TooMuch
from shim.kernel.beneath import NotMade, link_beneath, make_dir, open_dir
from shim.kernel.fds import OwnedFd
from shim.rootfs.inode import O_SOURCE_DIR, Changed, set_times
from shim.shm.precopy import PrecopyingCopier

if TYPE_CHECKING:
    from shim.kernel.stopping import Stop
    from shim.rootfs.inode import Copier

_O_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_DEPTH = 100
_MOST_LOOKED_AT = 10_000
"""The most names of a directory that `precopy` looks at. `finish` finds big files beyond them."""


class Selection(Protocol):
    """Decides which entries are the container's own. A method may raise to refuse the capture."""

    def early(self, status: os.stat_result) -> bool:
        """Returns whether a file is surely the container's own, while everything runs."""

    def file(self, status: os.stat_result, path: str) -> bool:
        """Returns whether a file is the container's own. path: relative."""

    def directory(self, status: os.stat_result, path: str, *, is_empty: bool) -> bool:
        """Returns whether a directory is the container's own, even if no entry in it is."""


class ShmCopy:
    """Copies the content of the directory `shm` into the empty directory `target`.

    shm: on the host; empty if the container has none. stop: ends the work. own: selects the entries
    to copy; None for all. A context manager, which raises OSError if `shm` cannot be opened.
    """

    def __init__(
        self, shm: str, target: str, *, container: str, stop: Stop, own: Selection | None = None
    ) -> None:
        self._shm, self._target, self._container, self._own = shm, target, container, own
        self._stop = stop
        self._copier = PrecopyingCopier(stop)
        self._dir: OwnedFd | None = None

    def __enter__(self) -> Self:
        if self._shm:
            self._dir = OwnedFd(os.open(self._shm, _O_DIRECTORY))
        return self

    def __exit__(self, *_: object) -> None:
        self._copier.close()
        if self._dir:
            self._dir.close()

    def precopy(self) -> None:
        """Copy big files, which may change meanwhile. `finish` copies the files that fail."""
        if self._dir:
            with contextlib.suppress(OSError), open_dir(self._target) as target:
                _precopy(self._copier, self._dir.fileno(), target.fileno(), 0, self._own)

    def finish(self) -> None:
        """Copy everything; nothing changes any more.

        Keeps sizes, holes, owners, modes, xattrs and times, and hard links between the files. Syncs
        nothing. Raises ShmNotCopied, SnapshotTooBig, Stopped.
        """
        if not self._dir:
            return
        try:
            with open_dir(self._target) as target:
                capture = _Capture(self._copier, target.fileno(), self._own, self._stop)
                capture.directory(self._dir.fileno(), target.fileno(), "")
        except TooMuch as error:
            raise too_big(self._container, error) from error
        except (OSError, Changed, NotMade, ValueError) as error:
            raise ShmNotCopied(
                f"cannot copy /dev/shm to {self._target}", about=self._container,
                why=f"{type(error).__name__}: {error}", do="See that the store has room.",
            ) from error  # fmt: skip


def _precopy(
    copier: PrecopyingCopier,
    source_dirfd: int,
    target_dirfd: int,
    depth: int,
    own: Selection | None,
) -> None:
    with os.scandir(source_dirfd) as listing:
        entries = list(islice(listing, _MOST_LOOKED_AT))
    for entry in entries:
        with contextlib.suppress(OSError):  # gone, or no room
            if not entry.is_dir(follow_symlinks=False):
                if own is None or own.early(entry.stat(follow_symlinks=False)):
                    copier.precopy(source_dirfd, entry.name, target_dirfd)
            elif depth < _MAX_DEPTH:
                with OwnedFd(os.open(entry.name, O_SOURCE_DIR, dir_fd=source_dirfd)) as inner:
                    _precopy(copier, inner.fileno(), target_dirfd, depth + 1, own)


class _Capture:
    """A walk; remembers hard links."""

    def __init__(self, copier: Copier, root_dirfd: int, own: Selection | None, stop: Stop) -> None:
        self._copier, self._root_dirfd, self._own, self._stop = copier, root_dirfd, own, stop
        self._left = MAX_SHM_ENTRIES
        self._links: dict[tuple[int, int], str] = {}

    def directory(self, source_dirfd: int, target_dirfd: int, path: str) -> bool:
        """Copy the content of a directory. Returns whether the copy has any of it."""
        if path.count("/") > _MAX_DEPTH:
            raise TooMuch("directories in each other in /dev/shm", _MAX_DEPTH)
        with os.scandir(source_dirfd) as listing:
            entries = list(islice(listing, self._left + 1))
        self._left -= len(entries)
        if self._left < 0:
            raise TooMuch("files and directories in /dev/shm", MAX_SHM_ENTRIES)
        copied = False
        for entry in entries:
            self._stop.check()
            if entry.is_dir(follow_symlinks=False):
                copied |= self._subdirectory(source_dirfd, entry.name, target_dirfd, path)
            elif self._own is None or self._own.file(
                entry.stat(follow_symlinks=False), path + entry.name
            ):
                self._file(source_dirfd, entry, target_dirfd, path)
                copied = True
        if not copied and path and self._own is not None:
            status = os.fstat(source_dirfd)
            if not self._own.directory(status, path.rstrip("/"), is_empty=not entries):
                return False
        self._copier.copy_attributes(source_dirfd, target_dirfd)
        set_times(target_dirfd, os.fstat(source_dirfd))
        return True

    def _subdirectory(self, source_dirfd: int, name: str, target_dirfd: int, path: str) -> bool:
        with (
            OwnedFd(os.open(name, O_SOURCE_DIR, dir_fd=source_dirfd)) as source,
            make_dir(name, target_dirfd) as target,
        ):
            if self.directory(source.fileno(), target.fileno(), f"{path}{name}/"):
                return True
        os.rmdir(name, dir_fd=target_dirfd)
        return False

    def _file(
        self, source_dirfd: int, entry: os.DirEntry[str], target_dirfd: int, path: str
    ) -> None:
        status = entry.stat(follow_symlinks=False)
        first = self._links.get((status.st_dev, status.st_ino))
        if first is not None:
            link_beneath(self._root_dirfd, first, target_dirfd, entry.name)
            return
        if stat.S_ISBLK(status.st_mode) or stat.S_ISCHR(status.st_mode):
            raise ValueError(f"{path}{entry.name} is a device")
        status = self._copier.copy(source_dirfd, entry.name, target_dirfd)
        if status.st_nlink > 1:
            self._links[status.st_dev, status.st_ino] = path + entry.name
