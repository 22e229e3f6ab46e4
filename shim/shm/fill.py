"""Fills the new pod's /dev/shm with the captured content. Lean: the swap path imports it.

/dev/shm belongs to the pod, not to the container: another container may have put files there, and
may write there meanwhile. This module leaves an existing name alone if the file there is the same
but for its times. If the file differs, the swap cannot go on: somebody needs either content.

So `build` makes everything in a directory of the same file system that root alone may enter, and
`place` renames it in when it is complete. A container with root's uid can still enter the
directory. So attributes are only set through descriptors of a checked type (see
`shim.rootfs.inode`), and all that such a container can change is in this file system.

The order is `plan`, journal its list, `build`, journal that, `place`; `undo` takes the same list,
in any process.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from shim.contract.errors import ShmNotFilled
from shim.kernel.beneath import (
    O_PATH_NOFOLLOW,
    O_WALK,
    NotMade,
    by_descriptor,
    link_beneath,
    make_dir,
    open_beneath,
    open_dir,
)
from shim.kernel.fds import OwnedFd
from shim.kernel.libc import call
from shim.rootfs.inode import Changed, set_times
from shim.shm.filecopy import ParallelCopier

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shim.rootfs.inode import Copier

_CHUNK = 1 << 20
_O_LOOK = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_NOREPLACE = 1
"""Of renameat2(2)."""
_NOT_OURS = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV, errno.ENOTEMPTY, errno.EBUSY)
"""Errors that say: somebody removed our file or directory, replaced it, or filled it."""


def plan(source: str, target: str, *, container: str) -> list[str]:
    """Returns the relative paths of `source` that are to be made in `target`; parents come first.

    source: the shm directory of a snapshot. target: the pod's /dev/shm on the host. Raises
    ShmNotFilled if a file there differs from the captured file.
    """
    with (
        _border(target, container),
        open_dir(source) as source_fd,
        open_dir(target) as target_fd,
    ):
        return list(_missing(source_fd.fileno(), target_fd.fileno(), ""))


def build(source: str, target: str, put: Sequence[str], *, container: str) -> None:
    """Make the missing paths of `plan`: the same sizes, holes, owners, modes, xattrs and times.

    Nobody sees them yet. Raises ShmNotFilled; `undo` removes all of it.
    """
    copier = ParallelCopier()
    links: dict[tuple[int, int], str] = {}
    with (
        _border(target, container),
        open_dir(source) as source_fd,
        open_dir(target) as target_fd,
        make_dir(_private(container), target_fd.fileno()) as private_fd,
    ):
        pair = (source_fd.fileno(), private_fd.fileno())
        directories = [
            (path, place) for path, place, _ in _places(put)
            if _put(copier, *pair, path, place, links)
        ]  # fmt: skip
        for path, place in reversed(directories):  # last: making a file changes its directory
            with (
                open_beneath(pair[0], path, O_WALK) as made_of,
                open_beneath(pair[1], place, O_WALK) as made,
            ):
                copier.copy_attributes(made_of.fileno(), made.fileno())
                set_times(made.fileno(), os.fstat(made_of.fileno()))


def place(target: str, put: Sequence[str], *, container: str) -> None:
    """Give the files of `build` the names of the list `put`.

    Raises ShmNotFilled, also if a name came up meanwhile; `undo` removes all of it.
    """
    with _border(target, container), open_dir(target) as target_fd:
        with open_beneath(target_fd.fileno(), _private(container), O_WALK) as private_fd:
            for path, place, top in _places(put):
                if path == top:
                    _rename(private_fd.fileno(), place, target_fd.fileno(), path)
        os.rmdir(_private(container), dir_fd=target_fd.fileno())


def undo(target: str, put: Sequence[str], *, container: str, placed: bool) -> None:
    """Remove all that `build` and `place` made of `put`, however far they came. Idempotent.

    placed: whether `place` may have begun. A directory stays when somebody else put something
    into it, and so does what somebody put in the place of a directory of ours. Raises OSError.
    """
    with contextlib.suppress(FileNotFoundError), open_dir(target) as target_fd:
        left = _remove_private(target_fd.fileno(), put, container)
        for path, place, _ in reversed(list(_places(put)) if placed else ()):
            if place.partition("/")[0] not in left:  # it had not got its name
                _remove(target_fd.fileno(), path)


def _private(container: str) -> str:
    return f".quickthaw.{container}"


def _places(put: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yields each path, its place during `build`, and the topmost path that is built with it.

    All paths beneath a topmost path follow it in the list: a rename of the topmost moves them all.
    """
    number, top = 0, ""
    for path in put:
        if not top or not path.startswith(f"{top}/"):
            number, top = number + 1, path
        yield path, f"{number}{path[len(top) :]}", top


def _remove_private(target_fd: int, put: Sequence[str], container: str) -> frozenset[str]:
    """Remove the directory for `build`. Returns the names that were still in it."""
    try:
        with open_beneath(target_fd, _private(container), O_WALK) as private_fd:
            left = frozenset(os.listdir(private_fd.fileno()))
            for _, place, _ in reversed(list(_places(put))):
                _remove(private_fd.fileno(), place)
    except OSError as error:
        if error.errno not in _NOT_OURS:
            raise
        return frozenset()
    _remove(target_fd, _private(container))
    return left


def _rename(private_fd: int, place: str, target_fd: int, path: str) -> None:
    parent, _, name = path.rpartition("/")
    with open_beneath(target_fd, parent or ".", O_WALK) as directory:
        try:
            call(
                "renameat2", private_fd, os.fsencode(place), directory.fileno(), os.fsencode(name),
                _NOREPLACE, about=path,
            )  # fmt: skip
        except FileExistsError as error:
            raise ValueError(f"{path} exists: it came up meanwhile") from error


@contextlib.contextmanager
def _border(target: str, container: str) -> Iterator[None]:
    try:
        yield
    except (OSError, Changed, NotMade, ValueError) as error:
        raise ShmNotFilled(
            f"cannot fill {target}", about=container, why=str(error),
            do="Does another container of the pod use the same names in /dev/shm?",
        ) from error  # fmt: skip


def _missing(source_dirfd: int, target_dirfd: int, path: str) -> Iterator[str]:
    for name in sorted(os.listdir(source_dirfd)):
        wanted = os.stat(name, dir_fd=source_dirfd, follow_symlinks=False)
        try:
            there = os.stat(name, dir_fd=target_dirfd, follow_symlinks=False)
        except FileNotFoundError:
            yield from _all_of(source_dirfd, name, wanted, path)
            continue
        if _kind_and_owner(wanted) != _kind_and_owner(there):
            raise ValueError(f"{path}{name} exists with another type, mode or owner")
        if stat.S_ISDIR(wanted.st_mode):
            with _opened(name, O_WALK, source_dirfd, target_dirfd) as (inner, inner_target):
                yield from _missing(inner, inner_target, f"{path}{name}/")
        elif not _same_content(source_dirfd, target_dirfd, name, wanted, there):
            raise ValueError(f"{path}{name} exists with other content")


def _all_of(dirfd: int, name: str, status: os.stat_result, path: str) -> Iterator[str]:
    yield path + name
    if stat.S_ISDIR(status.st_mode):
        with OwnedFd(os.open(name, O_WALK, dir_fd=dirfd)) as inner:
            for child in sorted(os.listdir(inner.fileno())):
                below = os.stat(child, dir_fd=inner.fileno(), follow_symlinks=False)
                yield from _all_of(inner.fileno(), child, below, f"{path}{name}/")


def _kind_and_owner(status: os.stat_result) -> tuple[int, int, int, int]:
    size = status.st_size if stat.S_ISREG(status.st_mode) else 0
    return status.st_mode, status.st_uid, status.st_gid, size


@contextlib.contextmanager
def _opened(name: str, flags: int, *dirfds: int) -> Iterator[list[int]]:
    with contextlib.ExitStack() as opened:
        yield [opened.enter_context(OwnedFd(os.open(name, flags, dir_fd=dirfd))).fileno()
               for dirfd in dirfds]  # fmt: skip


def _same_content(
    source_dirfd: int, target_dirfd: int, name: str, wanted: os.stat_result, there: os.stat_result
) -> bool:
    if stat.S_ISLNK(wanted.st_mode):
        return os.readlink(name, dir_fd=source_dirfd) == os.readlink(name, dir_fd=target_dirfd)
    if not stat.S_ISREG(wanted.st_mode):
        return wanted.st_rdev == there.st_rdev
    # Another container may put a fifo or a device in its place while we look.
    with _opened(name, O_PATH_NOFOLLOW | os.O_CLOEXEC, source_dirfd, target_dirfd) as (one, other):
        if not all(stat.S_ISREG(os.fstat(each).st_mode) for each in (one, other)):
            return False
        with (
            OwnedFd(os.open(by_descriptor(one), _O_LOOK)) as ours,
            OwnedFd(os.open(by_descriptor(other), _O_LOOK)) as theirs,
        ):
            return _is_same(ours.fileno(), theirs.fileno())


def _is_same(one: int, other: int) -> bool:
    while chunk := os.read(one, _CHUNK):
        if os.read(other, len(chunk)) != chunk:
            return False
    return not os.read(other, 1)


def _put(
    copier: Copier,
    source_fd: int,
    private_fd: int,
    path: str,
    place: str,
    links: dict[tuple[int, int], str],
) -> bool:
    """Make a path. Returns whether it is a directory, whose attributes are still to be set."""
    parent, _, name = path.rpartition("/")
    directory_at, _, made = place.rpartition("/")
    with (
        open_beneath(source_fd, parent or ".", O_WALK) as source,
        open_beneath(private_fd, directory_at or ".", O_WALK) as directory,
    ):
        status = os.stat(name, dir_fd=source.fileno(), follow_symlinks=False)
        key = (status.st_dev, status.st_ino)
        if stat.S_ISDIR(status.st_mode):
            make_dir(made, directory.fileno()).close()
            return True
        if stat.S_ISBLK(status.st_mode) or stat.S_ISCHR(status.st_mode):
            raise ValueError(f"{path} is a device")
        if key in links:
            link_beneath(private_fd, links[key], directory.fileno(), made)
        else:
            copier.copy(source.fileno(), name, directory.fileno(), made)
            links[key] = place
    return False


def _remove(dirfd: int, path: str) -> None:
    """Leaves names that are gone, or that are no longer the files that we made."""
    parent, _, name = path.rpartition("/")
    try:
        with open_beneath(dirfd, parent or ".", O_WALK) as directory:
            try:
                os.unlink(name, dir_fd=directory.fileno())
            except IsADirectoryError:
                os.rmdir(name, dir_fd=directory.fileno())
    except OSError as error:
        if error.errno not in _NOT_OURS:
            raise
