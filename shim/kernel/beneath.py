"""Files beneath a directory descriptor: a path never leaves it and never follows a symlink.

For every name that a pod, an image or a snapshot had a say in. Lean.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct

from shim.kernel.fds import OwnedFd
from shim.kernel.libc import NR_OPENAT2, syscall

_NO_MAGICLINKS = 0x02
_NO_SYMLINKS = 0x04
_BENEATH = 0x08
_IN_ROOT = 0x10
_AT_EAGAIN_TRIES = 8

O_PATH_NOFOLLOW = os.O_PATH | os.O_NOFOLLOW
O_WALK = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
"""To list a directory by its own single name, where openat2 would tell nothing more."""


def open_beneath(
    root_dirfd: int, path: str | bytes, flags: int = os.O_RDONLY, mode: int = 0
) -> OwnedFd:
    """Open `path` without ever leaving the directory `root_dirfd`.

    A symlink anywhere on the way, also as the last part, is ELOOP; `..` out of the root and an
    absolute path are EXDEV. `mode` counts only with O_CREAT. Raises OSError. Source: openat2(2).
    """
    return _openat2(root_dirfd, path, flags, mode, _BENEATH | _NO_SYMLINKS | _NO_MAGICLINKS)


def open_in_root(root_dirfd: int, path: str, flags: int = os.O_RDONLY) -> OwnedFd:
    """Open `path` as a process would whose root is `root_dirfd`: its links lead nowhere else.

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
            # The kernel could not prove it while something beneath was being renamed.
            if error.errno != errno.EAGAIN or not left:
                raise
        else:
            return OwnedFd(fd)
    raise AssertionError("not reached")


def open_dir(path: str) -> OwnedFd:
    """Open a directory of ours by its trusted path, as the root of what follows."""
    return OwnedFd(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))


def read_beneath(root_dirfd: int, path: str, *, limit_bytes: int) -> bytes:
    """The content of a regular file. Raises OSError; EFBIG beyond the limit, EINVAL otherwise."""
    # O_NONBLOCK: a fifo in its place must not hold us up.
    with open_beneath(root_dirfd, path, os.O_RDONLY | os.O_NONBLOCK) as fd:
        if not stat.S_ISREG(os.fstat(fd.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        with os.fdopen(fd.steal(), "rb") as file:
            content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise OSError(errno.EFBIG, f"longer than {limit_bytes} bytes", path)
    return content


def remove_tree(parent_dirfd: int, name: str) -> None:
    """Remove `name` of `parent_dirfd` and all beneath it. It is no error when it is gone.

    `name` has no slash. Mount points beneath are EBUSY: they are never emptied.
    """
    try:
        os.unlink(name, dir_fd=parent_dirfd)
    except FileNotFoundError:
        return
    except IsADirectoryError:
        with OwnedFd(os.open(name, O_WALK, dir_fd=parent_dirfd)) as dirfd:
            empty_dir(dirfd.fileno())
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(name, dir_fd=parent_dirfd)


def empty_dir(dirfd: int) -> None:
    """Remove everything in the directory `dirfd` and leave the directory."""
    for name in os.listdir(dirfd):
        remove_tree(dirfd, name)
