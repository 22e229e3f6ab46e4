"""Puts small files in place, whole or not at all, and removes files that may be missing. Lean.

The only writer by rename: every file that another program reads while we replace it comes from
here. See `shim.store.durable` for the store's records.
"""

from __future__ import annotations

import contextlib
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_SCRATCH = ".new"
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def _nothing() -> None:
    pass


def put(
    path: str,
    content: str | bytes,
    *,
    dir_fd: int | None = None,
    mode: int = 0o600,
    owner: tuple[int, int] | None = None,
    is_durable: bool = False,
    written: Callable[[], None] = _nothing,
) -> None:
    """Put `content` into a file, in place by a rename. Raises OSError.

    Also safe in a directory that a container writes: the scratch file is new, root's alone until
    its content is complete, and no link leads anywhere. After a failure the file is as it was, and
    nothing else is left. dir_fd: of the directory in which a relative `path` begins. owner: uid and
    gid. is_durable: sync the content before the rename; the caller syncs the directory.
    written: called before the rename.
    """
    directory, slash, name = path.rpartition("/")
    scratch = f"{directory}{slash}.{name}.{os.getpid()}{_SCRATCH}"
    take_away(scratch, dir_fd=dir_fd)  # of a killed process that had our number, or planted
    fd = os.open(scratch, _NEW, 0o600, dir_fd=dir_fd)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            if owner:
                os.fchown(fd, *owner)
            os.fchmod(fd, mode)  # whatever the umask is
            if is_durable:
                os.fsync(fd)
        written()
        os.rename(scratch, path, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except BaseException:  # also a deadline that strikes in between
        with contextlib.suppress(OSError):
            os.unlink(scratch, dir_fd=dir_fd)
        raise


def is_scratch(name: str) -> bool:
    """Returns whether a killed `put` can have left this file. Anybody may remove such a file."""
    return name.startswith(".") and name.endswith(_SCRATCH)


def take_away(path: str, *, dir_fd: int | None = None) -> bool:
    """Remove the file. Returns False if the file does not exist. Raises OSError."""
    try:
        os.unlink(path, dir_fd=dir_fd)
    except FileNotFoundError:
        return False
    return True
