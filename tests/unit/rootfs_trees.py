"""Real overlays in a mount namespace of our own, random changes to them, and their visible
content.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import stat
from typing import TYPE_CHECKING

import pytest
from hypothesis import strategies as st

from shim.kernel import mounts
from tests.node.kernel import CLONE_FS, CLONE_NEWNS, MS_PRIVATE, MS_REC, setns, unshare

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

DIRS = ("a", "b", "a/c", "a/c/d")
NAMES = (*DIRS, "f", "g", "a/f", "a/g", "b/f", "a/c/f", "a/c/d/f")
OPERATIONS = (
    "write", "append", "sparse", "remove", "mkdir", "symlink", "link", "rename", "xattr", "chmod",
    "chown", "utime", "fifo", "device", "socket", "replace", "acl",
)  # fmt: skip
_ACL = bytes.fromhex(  # user::rwx user:1000:r-- group::r-x mask::r-x other::---
    "02000000" "01000700ffffffff" "02000400e8030000" "04000500ffffffff" "10000500ffffffff"
    "20000000ffffffff"
)  # fmt: skip

changes = st.lists(
    st.tuples(
        st.sampled_from(OPERATIONS), st.sampled_from(NAMES), st.sampled_from(NAMES),
        st.integers(0, 255),
    ),
    max_size=14,
)  # fmt: skip


@contextlib.contextmanager
def own_mounts(scratch: Path) -> Iterator[Path]:
    """Run in a mount namespace of our own; `scratch` can hold upperdirs there."""
    if os.geteuid():
        pytest.skip("needs root")
    with open("/proc/self/ns/mnt") as before:
        directory = os.getcwd()
        unshare(CLONE_NEWNS)
        try:
            mounts.mount("none", "/", "", MS_REC | MS_PRIVATE)
            if _fstype(scratch) == "overlay":  # CI in a container: no upperdir can be there
                mounts.mount("tmpfs", str(scratch), "tmpfs")
            yield scratch
        finally:
            unshare(CLONE_FS)  # setns refuses while a joined thread is not quite gone
            setns(before.fileno(), CLONE_NEWNS)
            os.chdir(directory)


def _fstype(path: Path) -> str:
    above = [m for m in mounts.read_mounts() if path.is_relative_to(m.target)]
    return max(above, key=lambda m: len(m.target)).fstype


def make_dirs(parent: Path, *names: str) -> list[str]:
    """Makes fresh directories; returns their paths."""
    for name in names:
        (parent / name).mkdir(parents=True)
    return [str(parent / name) for name in names]


@contextlib.contextmanager
def overlay(
    target: str, lowerdirs: Sequence[str], upper: str = "", work: str = ""
) -> Iterator[str]:
    """Mount an overlay as containerd does; read-only without an upperdir."""
    os.makedirs(target, exist_ok=True)
    data = "index=off,lowerdir=" + ":".join(lowerdirs)
    if upper:
        data += f",upperdir={upper},workdir={work}"
    mounts.mount("overlay", target, "overlay", 0, data)
    try:
        yield target
    finally:
        mounts.unmount(target)


def change(root: str, steps: Sequence[tuple[str, str, str, int]]) -> None:
    """Do the steps; a step that makes no sense in the state of the tree does nothing."""
    for step in steps:
        with contextlib.suppress(OSError):
            _change(root, *step)


def random_steps(seed: int) -> Iterator[tuple[str, str, str, int]]:
    """Steps without end, the same for the same seed."""
    dice = random.Random(seed)  # noqa: S311
    while True:
        yield (
            dice.choice(OPERATIONS), dice.choice(NAMES), dice.choice(NAMES), dice.randrange(256)
        )  # fmt: skip


def _change(root: str, operation: str, name: str, other: str, number: int) -> None:  # noqa: C901, PLR0912, PLR0915
    path, second = f"{root}/{name}", f"{root}/{other}"
    match operation:
        case "write":
            _write(path, os.O_TRUNC, bytes([number]) * number * 40)
        case "append":
            _write(path, os.O_APPEND, b"more")
        case "sparse":
            _write(path, os.O_TRUNC, b"island", hole=number << 12)
        case "remove" | "replace":
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
                if operation == "replace" and number % 2:
                    os.mkdir(path)
            else:
                os.unlink(path)
                if operation == "replace":
                    os.mkdir(path)
        case "mkdir":
            os.mkdir(path, 0o700 | number)
        case "symlink":
            os.symlink(f"{number}/{other}", path)
        case "link":
            os.link(path, second)
        case "rename":
            os.rename(path, second)
        case "xattr":
            prefix = ("user.", "trusted.", "security.")[number % 3]
            os.setxattr(path, f"{prefix}quickthaw{number % 5}", bytes([number]) * number)
        case "acl":
            names = ["system.posix_acl_access"]
            if os.path.isdir(path):
                names.append("system.posix_acl_default")
            os.setxattr(path, names[number % len(names)], _ACL)
        case "chmod":
            os.chmod(path, 0o7000 | number)
        case "chown":
            os.chown(path, number, number + 1, follow_symlinks=False)
        case "utime":
            os.utime(path, ns=(number, number * 1_000_000_007), follow_symlinks=False)
        case _:
            kind = {"fifo": stat.S_IFIFO, "device": stat.S_IFCHR, "socket": stat.S_IFSOCK}[
                operation
            ]
            os.mknod(path, kind | 0o640, os.makedev(1, 3) if operation == "device" else 0)


def _write(path: str, flags: int, data: bytes, *, hole: int = 0) -> None:
    # O_NONBLOCK: a fifo without a reader is an error then.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | flags, 0o644)
    try:
        if hole:
            os.truncate(fd, 2 * hole)
            os.lseek(fd, hole, os.SEEK_SET)
        os.write(fd, data)
    finally:
        os.close(fd)


def view(root: str, *, link_counts: bool = True) -> dict[str, tuple[object, ...]]:
    """Returns everything that a process can see of a tree, except access times and inode
    numbers.
    """
    seen: dict[str, tuple[object, ...]] = {}
    groups: dict[tuple[int, int], str] = {}
    for path in _walk(root):
        status = os.lstat(path)
        name = os.path.relpath(path, root)
        is_dir = stat.S_ISDIR(status.st_mode)
        group = groups.setdefault((status.st_dev, status.st_ino), name)
        seen[name] = (
            oct(status.st_mode), status.st_uid, status.st_gid, status.st_rdev,
            0 if is_dir else status.st_size, status.st_mtime_ns, _content(path, status),
            {key: os.getxattr(path, key, follow_symlinks=False)
             for key in sorted(os.listxattr(path, follow_symlinks=False))},
            name if is_dir else group, status.st_nlink if link_counts and not is_dir else 0,
        )  # fmt: skip
    return seen


def _walk(root: str) -> Iterator[str]:
    yield root
    for directory, dirs, files in os.walk(root):
        dirs.sort()
        yield from (os.path.join(directory, name) for name in sorted(dirs + files))


def _content(path: str, status: os.stat_result) -> str:
    if stat.S_ISLNK(status.st_mode):
        return os.readlink(path)
    if not stat.S_ISREG(status.st_mode):
        return ""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()
