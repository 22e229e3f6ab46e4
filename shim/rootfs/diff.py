"""Copies a container's writable layer to a directory that can be an overlay lower layer.

Mounted above the image's layers, the copy shows the files that the container saw. A restored
container has two such layers, its own upperdir and the diff of its snapshot: the copy merges them
as overlayfs would. The container may run meanwhile (`precopy`); `finish` copies again, in the
frozen window, all that the container changed. Nothing here syncs: the caller syncs before it
publishes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shim.contract.errors import RootfsNotCopied, too_big
from shim.contract.limits import MAX_DEPTH, MAX_ENTRIES, MAX_PATH_BYTES, TooMuch
from shim.kernel.beneath import (
    O_PATH_NOFOLLOW,
    O_WALK,
    NotMade,
    by_descriptor,
    link_beneath,
    open_beneath,
    remove_tree,
)
from shim.kernel.fds import OwnedFd
from shim.kernel.stopping import Stop
from shim.rootfs.inode import O_SOURCE_DIR, Changed, Copier, set_times
from shim.rootfs.layers import Marks, base_has, merge, open_merged

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from shim.rootfs.layers import Found

_SETTLED_NS = 2_000_000_000
"""A file may change again unseen if its inode changed this shortly before the read: the clock of a
file system moves in steps, of up to a second or two on old formats."""
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ESTALE, errno.ENXIO)
_WHITEOUT = (0,)
"""The state of a name that is a whiteout: all whiteouts are alike."""


@dataclass(frozen=True, slots=True)
class CopyStats:
    """The figures of a pass.

    files: inodes copied. bytes: their sizes together. seconds: wall time. unsettled_bytes: of files
    that changed within two seconds before their copy, so that the next pass copies them again; if
    that is much, wait two seconds and run `precopy` once more.
    """

    files: int
    bytes: int
    seconds: float
    unsettled_bytes: int


@dataclass(slots=True)
class _Copied:
    """An entry of the target: the state of the source's inode when it was copied."""

    state: tuple[int, ...]
    settled: bool
    atime_ns: int
    children: dict[str, _Copied] | None = None


@dataclass(slots=True)
class _Pass:
    """A walk over everything."""

    frozen: bool
    settled_before_ns: int
    always: frozenset[tuple[int, int]]
    wanted: frozenset[int] = frozenset()
    links: dict[tuple[int, int], str] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    entries: int = 0
    unsettled_bytes: int = 0


class DiffCopy:
    """A copy in several passes: `precopy` any number of times, then `finish` once.

    layers: directories, the topmost first, as in `lowerdir`: the upperdir, then the diff of the
    snapshot that the container itself came from. base: the image's layers below, only for a look at
    their names. A whiteout that hides only a name of a lower directory in `layers`, and none of
    `base`, would appear as a device where overlayfs merges nothing. target: an empty directory of
    ours. userxattr: the overlay is mounted with that option. stop: ends any pass at its next entry.

    All methods raise RootfsNotCopied, SnapshotTooBig or Stopped; then the target is worthless.
    """

    def __init__(
        self,
        layers: Sequence[str],
        target: str,
        *,
        container: str,
        base: Sequence[str] = (),
        userxattr: bool = False,
        stop: Stop | None = None,
    ) -> None:
        self._container, self._target, self._stop = container, target, stop or Stop()
        self._marks = Marks("user.overlay." if userxattr else "trusted.overlay.")
        self._copier = Copier(self._marks.travels, self._stop.check)
        self._seen: dict[str, _Copied] = {}
        self._device = 0
        self._pass = _Pass(frozen=False, settled_before_ns=0, always=frozenset())
        with contextlib.ExitStack() as opened, self._border():
            self._layers = [_open(path, opened) for path in layers]
            self._base = [_open(path, opened) for path in base]
            self._root = _open(target, opened)
            if os.listdir(self._root):
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), target)
            self._opened = opened.pop_all()

    def __enter__(self) -> DiffCopy:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def precopy(self) -> CopyStats:
        """Copy while the container runs. `finish` copies files that vanish or change meanwhile."""
        return self._run(frozen=False, always=frozenset())

    def finish(
        self,
        always: Iterable[tuple[int, int]] = (),
        always_paths: Iterable[str] = (),
        wanted: Iterable[int] = (),
    ) -> CopyStats:
        """Make the target equal to the layers, which must not change any more.

        Copies the changes since the last pass, and removes names that are gone. A write through a
        shared mapping need not show in the times of its file. So `always` has the (st_dev, st_ino)
        in the layer of files to copy whatever their times say; `always_paths` names such files as
        the container sees them (the links in /proc/PID/map_files). wanted: inode numbers in the
        topmost layer, for `names`.
        """
        with self._border():
            keys = {*always, *self._keys(always_paths)}
        return self._run(frozen=True, always=frozenset(keys), wanted=frozenset(wanted))

    @property
    def names(self) -> Mapping[int, str]:
        """A path in the target of each inode number in `wanted` that the last `finish` found."""
        return self._pass.names

    def _keys(self, paths: Iterable[str]) -> Iterator[tuple[int, int]]:
        for path in paths:
            self._stop.check()
            for layer_fd in self._layers:
                try:
                    with open_beneath(layer_fd, path.lstrip("/"), O_PATH_NOFOLLOW) as fd:
                        status = os.fstat(fd.fileno())
                except OSError as error:
                    if error.errno not in _GONE:  # a file of a volume is in no layer
                        raise
                else:
                    yield status.st_dev, status.st_ino
                    break

    def _run(
        self,
        *,
        frozen: bool,
        always: frozenset[tuple[int, int]],
        wanted: frozenset[int] = frozenset(),
    ) -> CopyStats:
        began, files, size = time.monotonic(), self._copier.files, self._copier.bytes
        self._pass = _Pass(frozen, time.time_ns() - _SETTLED_NS, always, wanted)
        with self._border():
            self._device = os.fstat(self._layers[0]).st_dev
            self._children(self._layers, self._root, self._seen, "", sealed=False)
            self._copier.copy_attributes(self._layers[0], self._root)
            set_times(self._root, os.fstat(self._layers[0]))
        return CopyStats(
            self._copier.files - files, self._copier.bytes - size, time.monotonic() - began,
            self._pass.unsettled_bytes,
        )  # fmt: skip

    @contextlib.contextmanager
    def _border(self) -> Iterator[None]:
        try:
            yield
        except TooMuch as error:
            raise too_big(self._container, error) from error
        except (OSError, Changed, NotMade, ValueError) as error:
            raise RootfsNotCopied(
                f"cannot copy the root file system's changes to {self._target}",
                about=self._container, why=f"{type(error).__name__}: {error}",
                do="See that the store has room, and that containerd uses plain overlayfs.",
            ) from error  # fmt: skip

    def _children(
        self,
        dirfds: Sequence[int],
        target_dirfd: int,
        seen: dict[str, _Copied],
        path: str,
        *,
        sealed: bool,
    ) -> bool:
        """Make a directory's entries right. sealed: nothing below the layers shows through.

        Returns whether the target directory was written to.
        """
        if path.count("/") > MAX_DEPTH:
            raise TooMuch("directories in each other", MAX_DEPTH)
        if len(os.fsencode(path)) > MAX_PATH_BYTES:
            raise TooMuch("bytes of path", MAX_PATH_BYTES)
        found = merge(dirfds, self._marks, MAX_ENTRIES - self._pass.entries)
        self._pass.entries += len(found)
        changed = False
        for name in seen.keys() - found.keys():
            remove_tree(target_dirfd, name)
            del seen[name]
            changed = True
        for name, entry in found.items():
            self._stop.check()
            try:
                changed |= self._entry(entry, target_dirfd, seen, path + name, sealed=sealed)
            except (OSError, Changed) as error:
                if self._pass.frozen or (isinstance(error, OSError) and error.errno not in _GONE):
                    raise
                changed = True
                remove_tree(target_dirfd, name)
                seen.pop(name, None)
        return changed

    def _entry(
        self, entry: Found, target_dirfd: int, seen: dict[str, _Copied], path: str, *, sealed: bool
    ) -> bool:
        if entry.is_whiteout:
            return self._whiteout(entry, target_dirfd, seen, path, sealed=sealed)
        if entry.status is not None:
            return self._leaf(entry, entry.status, target_dirfd, seen, path)
        return self._directory(entry, target_dirfd, seen, path, sealed=sealed)

    def _directory(
        self, entry: Found, target_dirfd: int, seen: dict[str, _Copied], path: str, *, sealed: bool
    ) -> bool:
        old = seen.get(entry.name)
        if old is not None and old.children is None:
            self._drop(entry.name, target_dirfd, seen)
            old = None
        with open_merged(entry, self._marks) as (dirfds, opaque):
            status = os.fstat(dirfds[0])
            new = self._copied((*_state(status), opaque), status)
            new.children = {} if old is None else old.children
            assert new.children is not None  # noqa: S101 - for the type checker
            if old is None:
                os.mkdir(entry.name, 0o700, dir_fd=target_dirfd)
            seen[entry.name] = new
            with OwnedFd(os.open(entry.name, O_WALK, dir_fd=target_dirfd)) as target:
                changed = self._children(
                    dirfds, target.fileno(), new.children, f"{path}/", sealed=sealed or opaque
                )
                if old is None or not old.settled or old.state != new.state:
                    self._copier.copy_attributes(dirfds[0], target.fileno())
                    if opaque:
                        os.setxattr(target.fileno(), self._marks.opaque, b"y")
                    changed = True
                if changed or (old and old.atime_ns != new.atime_ns):
                    set_times(target.fileno(), status)
        return old is None

    def _leaf(
        self,
        entry: Found,
        status: os.stat_result,
        target_dirfd: int,
        seen: dict[str, _Copied],
        path: str,
    ) -> bool:
        name, key = entry.name, (status.st_dev, status.st_ino)
        if status.st_ino in self._pass.wanted and status.st_dev == self._device:
            self._pass.names.setdefault(status.st_ino, path)
        old = seen.get(name)
        if (old is not None and old.settled and old.state == _state(status)
                and key not in self._pass.always):  # fmt: skip
            if status.st_nlink > 1:
                self._pass.links.setdefault(key, path)
            # An earlier pass of ours set a symlink's time: readlink did.
            if old.atime_ns != status.st_atime_ns and not stat.S_ISLNK(status.st_mode):
                with OwnedFd(os.open(name, O_PATH_NOFOLLOW, dir_fd=target_dirfd)) as target:
                    set_times(by_descriptor(target.fileno()), status)
                old.atime_ns = status.st_atime_ns
            return False
        self._drop(name, target_dirfd, seen)
        first = self._pass.links.get(key)
        if first is not None:
            link_beneath(self._root, first, target_dirfd, name)
        else:
            status = self._copier.copy(entry.parents[0], name, target_dirfd)
            if status.st_nlink > 1:
                self._pass.links[status.st_dev, status.st_ino] = path
        new = seen[name] = self._copied(_state(status), status)
        if not new.settled:
            self._pass.unsettled_bytes += status.st_size
        return True

    def _whiteout(
        self, entry: Found, target_dirfd: int, seen: dict[str, _Copied], path: str, *, sealed: bool
    ) -> bool:
        """Copy a whiteout if something of the image is behind it.

        In a directory that is merged with nothing, overlayfs lists the whiteout as a plain device.
        """
        old = seen.get(entry.name)
        behind = not entry.hides or not self._base or base_has(self._base, path, self._marks)
        wanted = behind and not sealed
        if wanted and old is not None and old.state == _WHITEOUT:
            return False
        changed = self._drop(entry.name, target_dirfd, seen)
        if wanted:
            os.mknod(entry.name, stat.S_IFCHR, os.makedev(0, 0), dir_fd=target_dirfd)
            seen[entry.name] = _Copied(_WHITEOUT, settled=True, atime_ns=0)
        return changed or wanted

    def _drop(self, name: str, target_dirfd: int, seen: dict[str, _Copied]) -> bool:
        if seen.pop(name, None) is None:
            return False
        remove_tree(target_dirfd, name)
        return True

    def _copied(self, state: tuple[int, ...], status: os.stat_result) -> _Copied:
        settled = status.st_ctime_ns < self._pass.settled_before_ns
        return _Copied(state, settled, status.st_atime_ns)


def _state(status: os.stat_result) -> tuple[int, ...]:
    """Returns values that change with the inode. A chmod or an xattr shows in the ctime."""
    return (
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )  # fmt: skip


def _open(path: str, opened: contextlib.ExitStack) -> int:
    return opened.enter_context(OwnedFd(os.open(path, O_SOURCE_DIR))).fileno()
