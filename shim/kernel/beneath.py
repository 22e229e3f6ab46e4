"""Opens files beneath a directory descriptor: a path never leaves it and never follows a symlink.

Use it for every name that a pod, an image or a snapshot had a say in. Lean.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct

from shim.kernel.fds import OwnedFd
from shim.kernel.libc import NR_OPENAT2, syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_NO_MAGICLINKS = 0x02
_NO_SYMLINKS = 0x04
_BENEATH = 0x08
_IN_ROOT = 0x10
_AT_EAGAIN_TRIES = 8
_MOST_DEEP = 200

O_PATH_NOFOLLOW = os.O_PATH | os.O_NOFOLLOW
O_WALK = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
"""To list a directory by its own single name, where openat2 would give no more safety."""


class NotMade(Exception):
    """A name leads to another file than the file that this process has made."""


def open_beneath(
    root_dirfd: int, path: str | bytes, flags: int = os.O_RDONLY, mode: int = 0
) -> OwnedFd:
    """Open `path` without ever leaving the directory `root_dirfd`.

    A symlink anywhere on the way, also as the last part, is ELOOP; `..` out of the root and an
    absolute path are EXDEV. `mode` counts only with O_CREAT. Raises OSError. Source: openat2(2).
    """
    return _openat2(root_dirfd, path, flags, mode, _BENEATH | _NO_SYMLINKS | _NO_MAGICLINKS)


def open_in_root(root_dirfd: int, path: str, flags: int = os.O_RDONLY) -> OwnedFd:
    """Open `path` as a process whose root is `root_dirfd` would: links lead nowhere else.

    For names inside of a container, where links such as /var/run are usual. Raises OSError.
    """
    return _openat2(root_dirfd, path, flags, 0, _IN_ROOT | _NO_MAGICLINKS)


def _openat2(root_dirfd: int, path: str | bytes, flags: int, mode: int, resolve: int) -> OwnedFd:
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, mode, resolve)
    for left in reversed(range(_AT_EAGAIN_TRIES)):
        try:
            fd = syscall(
                NR_OPENAT2, root_dirfd, os.fsencode(path), how, len(how), about=os.fsdecode(path)
            )
        except OSError as error:
            # The kernel could not prove that the path stays beneath while a directory was being
            # renamed.
            if error.errno != errno.EAGAIN or not left:
                raise
        else:
            return OwnedFd(fd)
    raise AssertionError("not reached")


def open_dir(path: str) -> OwnedFd:
    """Open a directory of ours by its trusted path, as the root of further names."""
    return OwnedFd(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))


def read_beneath(root_dirfd: int, path: str, *, limit_bytes: int) -> bytes:
    """Returns a regular file's content. Raises OSError; EFBIG beyond the limit, else EINVAL."""
    # O_NONBLOCK: a fifo in the file's place must not hold us up.
    with open_beneath(root_dirfd, path, os.O_RDONLY | os.O_NONBLOCK) as fd:
        if not stat.S_ISREG(os.fstat(fd.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        with os.fdopen(fd.steal(), "rb") as file:
            content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise OSError(errno.EFBIG, f"longer than {limit_bytes} bytes", path)
    return content


def link_beneath(root_dirfd: int, path: str, dirfd: int, name: str) -> None:
    """Give the file `path`, beneath `root_dirfd`, a second name in the directory `dirfd`.

    Follows no symlink on the way; if the last part is a symlink, the symlink itself gets the name.
    Raises OSError.
    """
    with open_beneath(root_dirfd, path, O_PATH_NOFOLLOW) as fd:
        os.link(by_descriptor(fd.fileno()), name, dst_dir_fd=dirfd, follow_symlinks=True)


def files_beneath(dirfd: int, deep: int = _MOST_DEEP) -> Iterator[tuple[str, os.stat_result]]:
    """Yields everything beneath a directory but directories, by path, while the tree may change.

    Files that are replaced or removed meanwhile are left out. Unlike os.fwalk, this opens nothing
    but directories, and never follows a link. Raises OSError, also for more than `deep` levels.
    """
    if not deep:
        raise OSError(errno.ENAMETOOLONG, f"more than {_MOST_DEEP} directories in each other")
    with OwnedFd(os.open(".", O_WALK, dir_fd=dirfd)) as fd, os.scandir(fd.fileno()) as listing:
        for entry in listing:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if not entry.is_dir(follow_symlinks=False):
                    yield entry.name, entry.stat(follow_symlinks=False)
                    continue
                with OwnedFd(os.open(entry.name, O_WALK, dir_fd=fd.fileno())) as inner:
                    for path, status in files_beneath(inner.fileno(), deep - 1):
                        yield f"{entry.name}/{path}", status


def by_descriptor(fd: int) -> str:
    """Returns a path of exactly the open inode, also of a descriptor opened with O_PATH.

    For calls that take no such descriptor. The kernel does not follow the path any further, not
    even if the inode is a symlink. Source: proc_pid_fd(5), symlink(7).
    """
    return f"/proc/self/fd/{fd}"


def open_made(name: str, kind: int, dirfd: int) -> OwnedFd:
    """Open with O_PATH the file that this process has just made as `name` in the directory `dirfd`.

    kind: the type of the file, as of `stat.S_IFMT`. If others can write to the directory, the name
    may lead to another file by now: a link, a file of another user or of another file system.
    Raises NotMade for that, OSError.
    """
    with OwnedFd(os.open(name, O_PATH_NOFOLLOW | os.O_CLOEXEC, dir_fd=dirfd)) as fd:
        status = os.fstat(fd.fileno())
        is_ours = (status.st_dev, status.st_uid) == (os.fstat(dirfd).st_dev, os.geteuid())
        has_other_names = status.st_nlink > 1 and kind != stat.S_IFDIR
        if stat.S_IFMT(status.st_mode) != kind or not is_ours or has_other_names:
            raise NotMade(f"{name} was replaced by another file while it was made")
        return OwnedFd(fd.steal())


def make_dir(name: str, dirfd: int) -> OwnedFd:
    """Make a directory that only root may enter, and open it. Raises NotMade, OSError."""
    os.mkdir(name, 0o700, dir_fd=dirfd)
    with open_made(name, stat.S_IFDIR, dirfd) as made:
        return OwnedFd(os.open(".", O_WALK, dir_fd=made.fileno()))


def _nothing() -> None:
    pass


def remove_tree(parent_dirfd: int, name: str, tick: Callable[[], None] = _nothing) -> None:
    """Remove `name` of `parent_dirfd` and all beneath; no error when `name` is gone.

    `name` has no slash. Mount points beneath are EBUSY: they are never emptied. tick: called for
    each entry; an exception of it ends the work.
    """
    tick()
    try:
        os.unlink(name, dir_fd=parent_dirfd)
    except FileNotFoundError:
        return
    except IsADirectoryError:
        with OwnedFd(os.open(name, O_WALK, dir_fd=parent_dirfd)) as dirfd:
            empty_dir(dirfd.fileno(), tick)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(name, dir_fd=parent_dirfd)


def empty_dir(dirfd: int, tick: Callable[[], None] = _nothing) -> None:
    """Remove everything in the directory `dirfd` and leave the directory."""
    for name in os.listdir(dirfd):
        remove_tree(dirfd, name, tick)
