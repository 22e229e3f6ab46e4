"""Reads the mount table as records; mounts and unmounts, also by the mount API. Lean.

Sources: proc_pid_mountinfo(5), mount(2), umount(2), fsopen(2), fsconfig(2), fsmount(2),
move_mount(2).
"""

from __future__ import annotations

import contextlib
import os

from shim.kernel.fds import OwnedFd
from shim.kernel.libc import NR_FSCONFIG, NR_FSMOUNT, NR_FSOPEN, NR_MOVE_MOUNT, call, syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_NOSYMFOLLOW = 0x100
MS_NOATIME = 0x400
MS_NODIRATIME = 0x800
MS_BIND = 0x1000
MS_PRIVATE = 1 << 18
MS_SHARED = 1 << 20
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

MOUNT_FLAGS = {
    "ro": MS_RDONLY, "nosuid": MS_NOSUID, "nodev": MS_NODEV, "noexec": MS_NOEXEC,
    "noatime": MS_NOATIME, "nodiratime": MS_NODIRATIME, "relatime": MS_RELATIME,
    "nosymfollow": MS_NOSYMFOLLOW,
}  # fmt: skip
"""Per-mount options as mountinfo prints them. None of the atime words means strictatime."""

_MOUNT_ATTRS = {
    "ro": 0x1, "nosuid": 0x2, "nodev": 0x4, "noexec": 0x8, "noatime": 0x10, "nodiratime": 0x80,
    "nosymfollow": 0x200000,
}  # fmt: skip
_MOUNT_ATTR_STRICTATIME = 0x20
_AT_FDCWD = -100
_CLOEXEC = 1
_SET_FLAG, _SET_STRING, _CMD_CREATE = 0, 1, 6
_F_EMPTY_PATH = 4


class Mount:
    """A line of mountinfo, octal escapes undone except in `super_options`.

    device: `major:minor`. root: the part of the file system that is mounted. target: the mount
    point. options: of this mount (`rw`, `relatime`, …). propagation: `shared:7`, `master:3`,
    `unbindable`; empty for a private mount. super_options: of the file system, still escaped (see
    `pairs`).
    """

    __slots__ = (
        "device", "fstype", "mount_id", "options", "parent_id", "propagation", "root", "source",
        "super_options", "target",
    )  # fmt: skip

    def __init__(self, line: str) -> None:
        fields = line.split(" ")
        dash = fields.index("-", 6)
        if len(fields) < dash + 4:
            raise ValueError(f"a line of mountinfo that ends early: {line!r:.200}")
        self.mount_id, self.parent_id, self.device = int(fields[0]), int(fields[1]), fields[2]
        self.root, self.target = unescape(fields[3]), unescape(fields[4])
        self.options, self.propagation = tuple(fields[5].split(",")), tuple(fields[6:dash])
        self.fstype, self.source = fields[dash + 1], unescape(fields[dash + 2])
        self.super_options = fields[dash + 3]

    def pairs(self) -> Iterator[tuple[str, str | None]]:
        """Yields the file system's options in their order, as (name, value); None for a flag."""
        for option in split_options(self.super_options):
            name, equals, value = option.partition("=")
            yield unescape(name), unescape(value) if equals else None


def unescape(text: str) -> str:
    r"""Undo the kernel's escapes (`\040` for a blank).

    The escapes stand for bytes; the result is as os.fsdecode makes it.
    """
    if "\\" not in text:
        return text
    import re  # late: hardly any mount has an escape, and a pod waits

    octal, latin = r"\\([0-7]{3})", os.fsencode(text).decode("latin1")
    raw = re.sub(octal, lambda match: chr(int(match[1], 8) & 0xFF), latin)
    return os.fsdecode(raw.encode("latin1"))


def split_options(text: str) -> list[str]:
    """Split at commas, but not inside double quotes: SELinux contexts have commas."""
    if '"' not in text:
        return [option for option in text.split(",") if option]
    import re  # late, as above

    return re.findall(r'(?:"[^"]*"|[^,"])+', text)


def parse_mountinfo(content: bytes) -> list[Mount]:
    """Returns the records of a mountinfo file, in order. Raises ValueError on a malformed line."""
    return [Mount(line) for line in os.fsdecode(content).split("\n") if line]


def read_mounts(path: str = "/proc/self/mountinfo", kind: str = "") -> list[Mount]:
    """Returns the mounts that this process sees. Raises OSError.

    kind: only of file systems whose type begins like this; a node has very many mounts.
    """
    with open(path, "rb", buffering=0) as file:
        content = file.read()
    if kind:
        wanted = f" - {kind}".encode()
        content = b"\n".join(line for line in content.split(b"\n") if wanted in line)
    return [mount for mount in parse_mountinfo(content) if mount.fstype.startswith(kind)]


def mounts_at(target: str) -> list[Mount]:
    """Returns the mounts at `target`, an absolute path without symlinks, in order."""
    return [mount for mount in read_mounts() if mount.target == target]


def mount(source: str, target: str, fstype: str, flags: int = 0, data: str = "") -> None:
    """Call mount(2). `data` is at most 4095 bytes. Raises OSError that names the target."""
    call(
        "mount", os.fsencode(source), os.fsencode(target), os.fsencode(fstype), flags,
        os.fsencode(data), about=target,
    )  # fmt: skip


def set_propagation(target: str, kind: int) -> None:
    """Make the mount at `target` MS_SHARED or MS_PRIVATE."""
    mount("none", target, "", kind)


def make_read_only(target: str) -> None:
    """Make the mount at `target`, not its file system, read-only; later binds of it are, too."""
    mount("none", target, "", MS_REMOUNT | MS_BIND | MS_RDONLY)


def unmount(target: str, *, detach: bool = False) -> None:
    """Unmount the mount at `target`. detach: hide it now, end it after its last user (lazy)."""
    call("umount2", os.fsencode(target), UMOUNT_NOFOLLOW | (MNT_DETACH if detach else 0),
         about=target)  # fmt: skip


def remove_mount_point(directory: str) -> None:
    """Unmount the directory if needed, and remove it; no error when missing. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        if os.path.ismount(directory):
            unmount(directory, detach=True)
        os.rmdir(directory)


def mount_flags(options: Iterable[str]) -> int:
    """Returns the MS_ flags of options as mountinfo prints them. Raises ValueError for others."""
    flags = 0
    for option in options:
        if option == "rw":
            continue
        if option not in MOUNT_FLAGS:
            raise ValueError(f"unknown mount option {option}")
        flags |= MOUNT_FLAGS[option]
    return flags if flags & (MS_NOATIME | MS_RELATIME) else flags | MS_STRICTATIME


def mount_attributes(options: Iterable[str]) -> int:
    """Returns the MOUNT_ATTR_ bits of options, for `fsmount`. Raises ValueError for others."""
    names = set(options) - {"rw", "relatime"}
    if unknown := names - _MOUNT_ATTRS.keys():
        raise ValueError(f"unknown mount options {sorted(unknown)}")
    attributes = sum(_MOUNT_ATTRS[name] for name in names)
    strict = not {"relatime", "noatime"} & set(options)
    return attributes | (_MOUNT_ATTR_STRICTATIME if strict else 0)


class FsContext:
    """A file system being configured. Nothing is visible before `mount_at`.

    Errors carry the kernel's own message, which mount(2) leaves in the kernel log.
    """

    __slots__ = ("_fd",)

    def __init__(self, fstype: str) -> None:
        self._fd = OwnedFd(syscall(NR_FSOPEN, os.fsencode(fstype), _CLOEXEC, about=fstype))

    def set(self, name: str, value: str | None) -> None:
        """Set an option; None for a flag. A value is at most 255 bytes. Raises OSError."""
        kind = _SET_FLAG if value is None else _SET_STRING
        self._config(kind, os.fsencode(name), None if value is None else os.fsencode(value))

    def mount_at(self, target: str, attributes: int = 0) -> None:
        """Create the file system and mount it at `target`. Raises OSError."""
        self._config(_CMD_CREATE, None, None)
        fd = syscall(NR_FSMOUNT, self._fd.fileno(), _CLOEXEC, attributes, about=target)
        with OwnedFd(fd):
            syscall(NR_MOVE_MOUNT, fd, b"", _AT_FDCWD, os.fsencode(target), _F_EMPTY_PATH,
                    about=target)  # fmt: skip

    def _config(self, command: int, name: bytes | None, value: bytes | None) -> None:
        try:
            syscall(NR_FSCONFIG, self._fd.fileno(), command, name, value, 0)
        except OSError as error:
            words = self._log() or f"{os.strerror(error.errno or 0)} {os.fsdecode(name or b'')}"
            raise OSError(error.errno, words) from error

    def _log(self) -> str:
        words = []
        while True:
            try:
                words.append(os.fsdecode(os.read(self._fd.fileno(), 4096)).strip())
            except OSError:  # ENODATA: all messages were read
                return "; ".join(words)

    def __enter__(self) -> FsContext:
        return self

    def __exit__(self, *_: object) -> None:
        self._fd.close()
