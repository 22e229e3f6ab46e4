"""The new pod's /dev/shm gets what the captured one held. Lean: the swap path imports it.

/dev/shm belongs to the pod, not to the container: another container may have put files there. A
name that exists already is left alone when it is the same but for its times. When it differs the
swap cannot go on: either content is somebody's.

The order is `plan`, journal what it says, `fill`; `undo` takes the same list, in any process.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from shim.contract.errors import ShmNotFilled
from shim.kernel.beneath import O_WALK, open_beneath, open_dir
from shim.kernel.fds import OwnedFd
from shim.rootfs.inode import Changed
from shim.rootfs.shmcopy import ParallelCopier

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shim.rootfs.inode import Copier

_CHUNK = 1 << 20


def plan(source: str, target: str, *, container: str) -> list[str]:
    """The paths of `source`, relative, that `fill` has to make in `target`; parents come first.

    source: the shm directory of a snapshot. target: the pod's /dev/shm on the host. Raises
    ShmNotFilled when something there differs from what was captured.
    """
    with (
        _border(target, container),
        open_dir(source) as source_fd,
        open_dir(target) as target_fd,
    ):
        return list(_missing(source_fd.fileno(), target_fd.fileno(), ""))


def fill(source: str, target: str, put: Sequence[str], *, container: str) -> None:
    """Make what `plan` found missing: the same sizes, holes, owners, modes, xattrs and times.

    Raises ShmNotFilled, also when one of the names came up meanwhile; `undo` is the way back.
    """
    copier = ParallelCopier()
    links: dict[tuple[int, int], str] = {}
    with (
        _border(target, container),
        open_dir(source) as source_fd,
        open_dir(target) as target_fd,
    ):
        pair = (source_fd.fileno(), target_fd.fileno())
        directories = [path for path in put if _put(copier, *pair, path, links)]
        for path in reversed(directories):  # last, because making a file changes them
            with (
                open_beneath(pair[0], path, O_WALK) as made_of,
                open_beneath(pair[1], path, O_WALK) as made,
            ):
                copier.copy_attributes(made_of.fileno(), made.fileno())
                status = os.fstat(made_of.fileno())
                os.utime(made.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))


def undo(target: str, put: Sequence[str]) -> None:
    """Remove what `fill` made of the list `put`, however far it came. Idempotent.

    A directory stays when somebody else put something into it. Raises OSError.
    """
    with contextlib.suppress(FileNotFoundError), open_dir(target) as target_fd:
        for path in reversed(put):
            with contextlib.suppress(FileNotFoundError):
                _remove(target_fd.fileno(), path)


@contextlib.contextmanager
def _border(target: str, container: str) -> Iterator[None]:
    try:
        yield
    except (OSError, Changed, ValueError) as error:
        raise ShmNotFilled(
            f"cannot fill {target}", container=container, why=str(error),
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
) -> bool:  # fmt: skip
    if stat.S_ISLNK(wanted.st_mode):
        return os.readlink(name, dir_fd=source_dirfd) == os.readlink(name, dir_fd=target_dirfd)
    if not stat.S_ISREG(wanted.st_mode):
        return wanted.st_rdev == there.st_rdev
    # O_NONBLOCK: another container may put a fifo in its place while we look.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with _opened(name, flags, source_dirfd, target_dirfd) as (one, other):
        while chunk := os.read(one, _CHUNK):
            if os.read(other, len(chunk)) != chunk:
                return False
        return not os.read(other, 1)


def _put(
    copier: Copier, source_fd: int, target_fd: int, path: str, links: dict[tuple[int, int], str]
) -> bool:  # fmt: skip
    """Make one path. Returns whether it is a directory, whose attributes are still to be set."""
    parent, _, name = path.rpartition("/")
    with (
        open_beneath(source_fd, parent or ".", O_WALK) as source,
        open_beneath(target_fd, parent or ".", O_WALK) as directory,
    ):
        status = os.stat(name, dir_fd=source.fileno(), follow_symlinks=False)
        key = (status.st_dev, status.st_ino)
        if stat.S_ISDIR(status.st_mode):
            os.mkdir(name, 0o700, dir_fd=directory.fileno())
            return True
        if key in links:
            os.link(links[key], name, src_dir_fd=target_fd, dst_dir_fd=directory.fileno(),
                    follow_symlinks=False)  # fmt: skip
        else:
            copier.copy(source.fileno(), name, directory.fileno())
            links[key] = path
    return False


def _remove(target_fd: int, path: str) -> None:
    parent, _, name = path.rpartition("/")
    with open_beneath(target_fd, parent or ".", O_WALK) as directory:
        try:
            os.unlink(name, dir_fd=directory.fileno())
        except IsADirectoryError:
            try:
                os.rmdir(name, dir_fd=directory.fileno())
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise
