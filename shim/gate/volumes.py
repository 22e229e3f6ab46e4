"""Checks that files in volumes which captured processes have open are the same files. Lean.

CRIU opens the files by their paths, with all its own power, in the new container. Somebody who can
write to a volume may have changed it since: CRIU would open a link, a fifo or another file in the
place of the captured file, for a process that may not open it itself. So the snapshot has type,
owner and mode of each file (another volume of the same kind may have another device and inode). A
restore compares them beneath descriptors, holds the files, and compares again the files that CRIU
has opened: see `shim.restore.opened`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from shim.kernel.beneath import open_beneath, open_dir
from shim.kernel.capabilities import mask_of
from shim.kernel.fds import OwnedFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from shim.oci.spec import Spec

    Places = list[tuple[str, str]]
    Identity = tuple[int, int]

_LINK = (errno.ELOOP, errno.EXDEV)
_GONE = (errno.ENOENT, errno.ENOTDIR)
_FULL = ("CAP_DAC_OVERRIDE", "CAP_CHOWN", "CAP_FOWNER", "CAP_SETUID", "CAP_SYS_ADMIN")
"""With any of these a process can give itself every file."""
_READ = ("CAP_DAC_READ_SEARCH",)
_MODES = 0o177777
_FIELDS = ("at", "gid", "gone", "mode", "path", "rdev", "uid")


class VolumeFile:
    """A captured file. path: in the container. mode: with the type. rdev: of a device.

    at: the descriptors of the file, as process number in the container and name beneath /proc/PID.
    gone: the file has no name any more, and CRIU makes a new file like it.
    """

    __slots__ = _FIELDS

    def __init__(self, **fields: Any) -> None:
        """Raises ValueError for other fields, or other types, than `as_json` returns."""
        if fields.keys() != set(_FIELDS):
            raise ValueError("the fact volume_files is of another version of quickthaw")
        self.path, self.mode, self.rdev = str(fields["path"]), int(fields["mode"]), fields["rdev"]
        self.uid, self.gid, self.gone = int(fields["uid"]), int(fields["gid"]), fields["gone"]
        self.at = [(int(pid), str(link)) for pid, link in fields["at"]]
        if not 0 <= self.mode <= _MODES:
            raise ValueError(f"the fact volume_files has the mode {fields['mode']!r:.80}")

    def as_json(self) -> dict[str, object]:
        """Returns the fields as a plain object."""
        return {name: getattr(self, name) for name in _FIELDS}

    def differs(self, status: os.stat_result, *, is_place: bool = False) -> str:
        """Returns the difference between a file and this file; empty when there is none.

        is_place: the file is the mounted directory, whose owner and mode are the new volume's.
        """
        if stat.S_IFMT(status.st_mode) != stat.S_IFMT(self.mode):
            return f"is of another type, {status.st_mode:o} instead of {self.mode:o}"
        if status.st_rdev != self.rdev:
            return "is another device"
        if is_place and stat.S_ISDIR(status.st_mode):
            return ""
        if (status.st_uid, status.st_gid) != (self.uid, self.gid):
            own = f"{status.st_uid}:{status.st_gid}"
            return f"belongs to {own}, the captured one to {self.uid}:{self.gid}"
        if status.st_mode != self.mode:
            return f"has mode {status.st_mode:o}, the captured one {self.mode:o}"
        return ""


def parse(fact: object) -> tuple[list[VolumeFile], list[str]]:
    """Returns the files of the fact `volume_files`, and the directories of bound sockets.

    Raises ValueError for a fact that no capture has written.
    """
    if not isinstance(fact, dict) or fact.keys() != {"files", "made", "sockets_in"}:
        raise ValueError("the fact volume_files is of another version of quickthaw")
    if not all(isinstance(each, list) for each in fact.values()):
        raise ValueError("the fact volume_files has no lists")
    try:
        files = [VolumeFile(**each) for each in fact["files"]]
        return files, [str(each) for each in fact["sockets_in"]]
    except (TypeError, KeyError, OverflowError) as error:
        raise ValueError(f"the fact volume_files is malformed: {error}") from error


def made(fact: object) -> list[str]:
    """The files of the fact without any name, which CRIU makes again. Raises ValueError."""
    parse(fact)
    return [str(each) for each in fact["made"]] if isinstance(fact, dict) else []


def is_in(spec: Spec, path: str) -> bool:
    """Whether the path of the container is in a volume of this spec, or is a volume itself."""
    return finder(spec)(path)


def finder(spec: Spec) -> Callable[[str], bool]:
    """A function that is `is_in` for this spec, for many paths."""
    places = _places(spec)
    return lambda path: bool(_place_of(places, path)[1])


def changed(spec: Spec, fact: object) -> list[str]:
    """Returns the entries of the fact that differ in the volumes of this spec. Absent files pass:
    CRIU cannot open it, and then it says so. Raises ValueError.
    """
    files, sockets_in = parse(fact)
    places = _places(spec)
    found: list[str] = []
    with contextlib.ExitStack() as stack:
        found += [f"{each.path} {why}" for each in files if (why := _held(places, each, stack)[0])]
        for path in sockets_in:
            with contextlib.ExitStack() as briefly:
                if why := _why_not(_opened(*_place_of(places, path), briefly)):
                    found.append(f"{path} {why}")
    return found


def hold(
    spec: Spec, files: Sequence[VolumeFile], stack: contextlib.ExitStack
) -> tuple[list[str], dict[str, Identity]]:
    """Open all that are there until `stack` is left: what differs, and device and inode by path."""
    places = _places(spec)
    wrong: list[str] = []
    identities: dict[str, Identity] = {}
    for each in files:
        why, identity = _held(places, each, stack)
        if why:
            wrong.append(f"{each.path} {why}")
        elif identity:
            identities[each.path] = identity
    return wrong, identities


def may_open(spec: Spec, has: int, status: os.stat_result, *, write: bool) -> bool:
    """Whether the container's own credentials could open a file. has: its capabilities.

    The owner can, by changing the mode.
    """
    user = spec.user
    if has & mask_of(_FULL) or (not write and has & mask_of(_READ)):
        return True
    if status.st_uid == (user.get("uid") or 0):
        return True
    groups = {user.get("gid") or 0, *(user.get("additionalGids") or ())}
    in_group = status.st_gid in groups or has & mask_of(["CAP_SETGID"])
    bits = status.st_mode >> 3 if in_group else status.st_mode
    wanted = stat.S_IWOTH if write else stat.S_IROTH
    if stat.S_ISDIR(status.st_mode):
        wanted = stat.S_IXOTH  # a working directory, or to look up names in
    return bool(bits & wanted)


def _places(spec: Spec) -> Places:
    """Returns destination and source of each mount, the deepest first; no source if no volume."""
    return sorted(
        ((each.destination, each.source if each.is_bind else "") for each in spec.mounts),
        key=lambda place: -len(place[0]),
    )


def _place_of(places: Places, path: str) -> tuple[str, str]:
    """Returns the path beneath the volume that has it, and the volume's directory on the node."""
    for destination, source in places:
        if path == destination:
            return "", source
        if path.startswith(f"{destination}/"):
            return path[len(destination) + 1 :], source
    return "", ""


def _held(
    places: Places, file: VolumeFile, stack: contextlib.ExitStack
) -> tuple[str, Identity | None]:
    if file.gone:
        return "", None
    below, source = _place_of(places, file.path)
    if not source:
        return "is in no volume of this pod", None
    fd = _opened(below, source, stack)
    if fd < 0:
        return _why_not(fd), None
    try:
        status = os.fstat(fd)
    except OSError as error:
        return _why_not(-(error.errno or errno.EIO)), None
    return file.differs(status, is_place=not below), (status.st_dev, status.st_ino)


def _why_not(fd: int) -> str:
    """fd: of `_opened`. Empty for what is open, or not there."""
    if fd >= 0 or fd == -errno.ENOENT:
        return ""
    if fd == -errno.ELOOP:
        return "leads over a link"
    return f"cannot be looked at: {os.strerror(-fd)}"


def _opened(below: str, source: str, stack: contextlib.ExitStack) -> int:
    """A descriptor that opens nothing (O_PATH), or a negative errno: ELOOP for all links, ENOENT.

    A volume's server may be away, or answer as the pod's author likes: that blames no snapshot.
    """
    if not source:
        return -errno.ENOENT
    try:
        if not below:
            return stack.enter_context(OwnedFd(os.open(source, os.O_PATH | os.O_CLOEXEC))).fileno()
        with open_dir(source) as volume:
            found = open_beneath(volume.fileno(), below, os.O_PATH)
        return stack.enter_context(found).fileno()
    except OSError as error:
        if error.errno in _LINK:
            return -errno.ELOOP
        return -errno.ENOENT if error.errno in _GONE else -(error.errno or errno.EIO)
