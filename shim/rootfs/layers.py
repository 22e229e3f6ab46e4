"""Reads overlay layers as overlayfs does: whiteouts, opaque directories, hidden names.

Source: Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING

from shim.contract import limits
from shim.kernel.fds import OwnedFd
from shim.rootfs.inode import O_SOURCE_DIR

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class Marks:
    """overlayfs' own xattrs under their prefix: `trusted.overlay.` or `user.overlay.`."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.opaque = f"{prefix}opaque"
        self._whiteout = f"{prefix}whiteout"

    def travels(self, name: str) -> bool:
        """Returns whether an xattr belongs to the file, not to the mount of the layer.

        `origin`, `impure`, `nlink` and similar marks are about the other layers of that mount. The
        copy sets `opaque` anew where needed. The marks of an overlay inside the container have
        `overlay.` twice in our layer: they are content. Raises ValueError for marks without a
        meaning in a single layer: of a file without its data, or of a directory that stands for
        another.
        """
        if not name.startswith(self._prefix):
            return True
        mark = name.removeprefix(self._prefix)
        if mark in ("metacopy", "redirect"):
            raise ValueError(f"the overlay was mounted with {mark}: its layer is no whole copy")
        return mark.startswith("overlay.")

    def is_opaque(self, dirfd: int) -> bool:
        """Returns whether the directory hides its namesakes in the layers below."""
        return self._value(dirfd, self.opaque) == b"y"

    def has_whiteout_files(self, dirfd: int) -> bool:
        """Returns whether empty files with a mark may be whiteouts here (Linux >= 6.7)."""
        return self._value(dirfd, self.opaque) == b"x"

    def is_whiteout_file(self, dirfd: int, name: str) -> bool:
        """Returns whether the empty file `name` of such a directory is a whiteout."""
        return self._value(f"/proc/self/fd/{dirfd}/{name}", self._whiteout) is not None

    def _value(self, path: int | str, name: str) -> bytes | None:
        try:
            if isinstance(path, int):
                return os.getxattr(path, name)
            return os.getxattr(path, name, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP, errno.ENOENT):
                raise
            return None


class Found:
    """A name of a merged directory.

    status: of the topmost inode; None for a directory. parents: descriptors of the directories that
    `name` is in: for a directory all that are merged, the topmost first, for other files a single
    directory. masked: a directory above a different file, which ends the merge. hides: a whiteout
    above an entry of a lower layer in `layers`.
    """

    __slots__ = ("hides", "is_whiteout", "masked", "name", "parents", "status")

    def __init__(  # the frozen window pays for each Found: no dataclass, a single shared tuple
        self, name: str, status: os.stat_result | None, is_whiteout: bool, parents: tuple[int, ...]
    ) -> None:
        self.name, self.status, self.is_whiteout, self.parents = name, status, is_whiteout, parents
        self.masked = self.hides = False

    @property
    def is_dir(self) -> bool:
        """Whether this is a directory in the merged view."""
        return self.status is None


def merge(dirfds: Sequence[int], marks: Marks, most: int) -> dict[str, Found]:
    """Returns the names of a directory in several layers, the topmost first, with whiteouts.

    Raises TooMuch for more than `most` names, and remembers no more.
    """
    merged: dict[str, Found] = {}
    for dirfd in dirfds:
        for entry in _entries(dirfd, marks):
            above = merged.setdefault(entry.name, entry)
            if above is entry:
                if len(merged) > most:
                    raise limits.TooMuch("files and directories", limits.MAX_ENTRIES)
                continue
            if above.is_whiteout:
                above.hides = True
            elif above.is_dir and entry.is_dir and not above.masked:
                above.parents += (dirfd,)
            else:
                above.masked = True
    return merged


def _entries(dirfd: int, marks: Marks) -> Iterator[Found]:
    parents = (dirfd,)
    whiteout_files = marks.has_whiteout_files(dirfd)
    with os.scandir(dirfd) as listing:
        for item in listing:
            if item.is_dir(follow_symlinks=False):
                yield Found(item.name, None, False, parents)
                continue
            try:
                status = item.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # vanished between listing and stat; only before the freeze
            whiteout = is_whiteout(status) or (
                whiteout_files and not status.st_size and marks.is_whiteout_file(dirfd, item.name)
            )
            yield Found(item.name, status, whiteout, parents)


def is_whiteout(status: os.stat_result) -> bool:
    """Returns whether the inode is a character device 0/0."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


@contextlib.contextmanager
def open_merged(found: Found, marks: Marks) -> Iterator[tuple[list[int], bool]]:
    """Yields `found` as opened in each layer, the topmost first, and whether it hides all below.

    Raises OSError if the directory is gone or replaced by another file type.
    """
    with contextlib.ExitStack() as opened:
        dirfds: list[int] = []
        for parent in found.parents:
            fd = OwnedFd(os.open(found.name, O_SOURCE_DIR, dir_fd=parent))
            dirfds.append(opened.enter_context(fd).fileno())
            if marks.is_opaque(dirfds[-1]):
                yield dirfds, True
                return
        yield dirfds, found.masked


def base_has(base: Sequence[int], path: str, marks: Marks) -> bool:
    """Returns whether the merged layers `base`, the topmost first, show something at `path`."""
    for layer_fd in base:
        has, goes_on = _layer_has(layer_fd, path.split("/"), marks)
        if has or not goes_on:
            return has
    return False


def _layer_has(layer_fd: int, parts: list[str], marks: Marks) -> tuple[bool, bool]:
    """Returns whether a layer has the path, and whether the layers below it count."""
    goes_on = True
    with contextlib.ExitStack() as opened:
        dirfd = layer_fd
        for part in parts[:-1]:
            try:
                fd = OwnedFd(os.open(part, O_SOURCE_DIR, dir_fd=dirfd))
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise
                # Any other file type of this name hides all below, as a whiteout does.
                return False, goes_on and error.errno == errno.ENOENT
            dirfd = opened.enter_context(fd).fileno()
            goes_on = goes_on and not marks.is_opaque(dirfd)
        try:
            status = os.stat(parts[-1], dir_fd=dirfd, follow_symlinks=False)
        except FileNotFoundError:
            return False, goes_on
        return not is_whiteout(status), False
