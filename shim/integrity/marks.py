"""What was verified since the node booted, and has not been touched since. Lean.

A mark is what a file's inode was when its content was hashed: device, number, size, modification
and change time. The change time cannot be set, so that a file with an equal mark has the content
that it had then. Marks are kept in /run/quickthaw/verified/SNAPSHOT, one file for each part, root
only, and end with the boot. They count only on file systems of this node itself: a server's
change times are what the server says.

criu/ and memory/ have a mark for each file of content. rootfs/ and shm/, whose names a container
chose, have one seal: a digest over the marks of all entries in the order of the listing, which
says whether all of them are as they were, in 64 bytes however many there are.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import time

from shim.contract import jsontext
from shim.contract.paths import SNAPSHOT_ROOTFS, SNAPSHOT_SHM, VERIFIED
from shim.integrity.tree import identity, raw
from shim.kernel import filesystem, replace
from shim.kernel.beneath import O_WALK
from shim.kernel.fds import OwnedFd
from shim.kernel.sha256 import hexdigest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from shim.integrity.tree import Entry

    Marks = dict[str, list[int]]
    """Path beneath the snapshot's directory to the identity of its inode."""

SETTLED_NS = 50_000_000
"""A file that was changed this shortly before it was hashed gets no mark: the clock of a file
system goes in steps of up to 10 ms, and a second change within one would not show."""
_COARSE_NS = 2_000_000_000
"""The same where change times have whole seconds only."""
_LOCAL = (filesystem.EXT4, filesystem.XFS, filesystem.BTRFS, filesystem.TMPFS)
_SCHEMA = 2
_MOST_BYTES = 16 << 20
SEALED = (SNAPSHOT_ROOTFS, SNAPSHOT_SHM)
"""The parts that have a seal."""
_SEAL = ""
"""The name under which a seal is among the marks: no path is empty."""
_RECORD = struct.Struct("=QQqqq")
_pack = _RECORD.pack
_BLOCK_BYTES = 1024 * _RECORD.size


class Marker:
    """Marks the entries of one part; `add` them in the order of the listing."""

    __slots__ = ("_began_ns", "_entries", "_marks", "_seal", "_settled")

    def __init__(self, part: str) -> None:
        """Call it before the content is read."""
        self._seal = _Seal() if part in SEALED else None
        self._marks: Marks = {}
        self._entries, self._settled, self._began_ns = 0, 0, now_ns()

    def add(self, entry: Entry) -> None:
        """The next entry."""
        self._entries += 1
        self._settled += settled(entry.status, self._began_ns)
        if self._seal:
            self._seal.add(entry.status)
        else:
            self._marks[entry.below] = list(identity(entry.status))

    @property
    def marks(self) -> Marks:
        """Those of all entries, to see whether one changes. Call it when all are added."""
        if self._seal and self._entries and not self._marks:
            self._marks = self._seal.marks()
        return self._marks

    @property
    def settled(self) -> Marks:
        """The same, to be written; none when one of them may change again unseen.

        What is not marked could be changed, and nobody would look at it.
        """
        return self.marks if self._settled == self._entries else {}


class _Seal:
    """What stands for all entries of a part."""

    __slots__ = ("_pending", "_state")

    def __init__(self) -> None:
        self._state, self._pending = "", bytearray()

    def add(self, status: os.stat_result) -> None:
        """The next entry."""
        self._pending += _pack(
            status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )  # as `tree.identity`, which makes a tuple more
        if len(self._pending) >= _BLOCK_BYTES:
            self._take()

    def marks(self) -> Marks:
        """The seal over all that was added. Call it once."""
        self._take()
        return {_SEAL: [int(self._state, 16)]}

    def _take(self) -> None:
        self._state = hexdigest(self._state.encode() + self._pending)
        self._pending.clear()


def count_on(snapshot_dirfd: int) -> bool:
    """Whether marks mean something on the file system of the snapshot. Raises OSError."""
    return filesystem.magic(snapshot_dirfd) in _LOCAL


def settled(status: os.stat_result, hashed_ns: int) -> bool:
    """Whether a later change would show. hashed_ns: Unix time before the content was read."""
    steps = SETTLED_NS if status.st_ctime_ns % 1_000_000_000 else _COARSE_NS
    return status.st_ctime_ns < hashed_ns - steps


def now_ns() -> int:
    """The clock that change times are taken from."""
    return time.time_ns()


def read(snapshot: str, part: str, directory: str = VERIFIED) -> Marks:
    """The marks of one part; none when there is nothing readable."""
    try:
        with open(f"{directory}/{snapshot}/{part}", "rb") as file:
            found = jsontext.parse(file.read(_MOST_BYTES))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict) or found.get("schema") != _SCHEMA:
        return {}
    marks = found.get("marks")
    return marks if isinstance(marks, dict) else {}


def write(snapshot: str, part: str, marks: Mapping[str, object], directory: str = VERIFIED) -> None:
    """Replace the marks of one part. Raises OSError."""
    place = f"{directory}/{snapshot}"
    os.makedirs(place, 0o700, exist_ok=True)
    replace.put(f"{place}/{part}", jsontext.canonical({"schema": _SCHEMA, "marks": marks}))


def forget(snapshot: str, directory: str = VERIFIED) -> None:
    """Remove the marks of a snapshot that is gone. Raises OSError, not when there are none."""
    place = f"{directory}/{snapshot}"
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(place):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{place}/{name}")
        os.rmdir(place)


def first_changed(snapshot_dirfd: int, marks: Marks) -> str | None:
    """The first path whose inode is not as it was marked; None when all are."""
    for path, mark in marks.items():
        try:
            status = os.stat(raw(path), dir_fd=snapshot_dirfd, follow_symlinks=False)
        except (OSError, ValueError):
            return path
        if list(identity(status)) != mark:
            return path
    return None


def is_sealed(
    snapshot_dirfd: int, part: str, known: Marks, tick: Callable[[], None] = lambda: None
) -> bool:
    """Whether everything of rootfs/ or shm/ is as it was when `known` was written.

    tick: called for each directory; what it raises ends the work.
    """
    if _SEAL not in known:
        return False
    seal = _Seal()
    try:
        with OwnedFd(os.open(part, O_WALK, dir_fd=snapshot_dirfd)) as root:
            seal.add(os.fstat(root.fileno()))
            _add_directory(seal, root.fileno(), tick)
    except (OSError, RecursionError):
        return False
    return seal.marks() == known


def _add_directory(seal: _Seal, dirfd: int, tick: Callable[[], None]) -> None:
    """In the order of `tree.walk`, and without all that it looks at: a pod waits for this."""
    tick()
    add, look, is_directory = seal.add, os.stat, stat.S_ISDIR
    names: list[str] = os.listdir(dirfd)
    names.sort(key=None if "".join(names).isascii() else os.fsencode)
    for name in names:
        add(status := look(name, dir_fd=dirfd, follow_symlinks=False))
        if is_directory(status.st_mode):
            with OwnedFd(os.open(name, O_WALK, dir_fd=dirfd)) as inner:
                _add_directory(seal, inner.fileno(), tick)
