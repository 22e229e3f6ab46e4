"""Records files that were verified since the node booted, to see later whether they changed. Lean.

A mark is the state of a file's inode when its content was hashed: device, number, size,
modification and change time. Nobody can set the change time, so a file with an equal mark still has
the hashed content. Marks lie in /run/quickthaw/verified/SNAPSHOT, a file for each part, for root
only, and end with the boot. They count only on local file systems of this node: the change times of
a network file system are whatever its server says.

criu/ and memory/ have a mark for each data file. rootfs/ and shm/, whose names a container chose,
have a seal each: a digest over the marks of all entries in the order of the listing. A seal says in
64 bytes whether all entries are unchanged, however many there are.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import time

from shim.contract import jsontext
from shim.contract.paths import VERIFIED
from shim.integrity.tree import identity, raw
from shim.kernel import filesystem, replace
from shim.kernel.beneath import O_WALK
from shim.kernel.fds import OwnedFd
from shim.kernel.sha256 import hexdigest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from shim.contract.parts import SnapshotPart
    from shim.integrity.tree import Entry

    Marks = dict[str, list[int]]
    """Path beneath the snapshot's directory to the identity of its inode."""

SETTLED_NS = 50_000_000
"""A file gets no mark if it changed less than this before it was hashed: the clock of a file system
moves in steps of up to 10 ms, and a second change within a step would not show."""
_COARSE_NS = 2_000_000_000
"""The same limit for change times in whole seconds."""
_LOCAL = (filesystem.EXT4, filesystem.XFS, filesystem.BTRFS, filesystem.TMPFS)
_SCHEMA = 2
_MOST_BYTES = 16 << 20
_SEAL = ""
"""The key of a seal among the marks: no path is empty."""
_RECORD = struct.Struct("=QQqqq")
_pack = _RECORD.pack
_BLOCK_BYTES = 1024 * _RECORD.size


class Marker:
    """Marks the entries of a part; call `add` in the order of the listing."""

    __slots__ = ("_began_ns", "_entries", "_marks", "_seal", "_settled")

    def __init__(self, part: SnapshotPart) -> None:
        """Call this before the content is read."""
        self._seal = _Seal() if part.is_tree else None
        self._marks: Marks = {}
        self._entries, self._settled, self._began_ns = 0, 0, now_ns()

    def add(self, entry: Entry) -> None:
        """Add the next entry."""
        self._entries += 1
        self._settled += settled(entry.status, self._began_ns)
        if self._seal:
            self._seal.add(entry.status)
        else:
            self._marks[entry.below] = list(identity(entry.status))

    @property
    def marks(self) -> Marks:
        """The marks of all entries, to detect changes. Read this after the last `add`."""
        if self._seal and self._entries and not self._marks:
            self._marks = self._seal.marks()
        return self._marks

    @property
    def settled(self) -> Marks:
        """The same marks, for writing; none if an entry may change again unseen.

        All or none: an attacker could change an unmarked file, and nobody would look at that file.
        """
        return self.marks if self._settled == self._entries else {}


class _Seal:
    """A digest that stands for all entries of a part."""

    __slots__ = ("_pending", "_state")

    def __init__(self) -> None:
        self._state, self._pending = "", bytearray()

    def add(self, status: os.stat_result) -> None:
        """Add the next entry."""
        self._pending += _pack(
            status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )  # as `tree.identity`, which makes another tuple
        if len(self._pending) >= _BLOCK_BYTES:
            self._take()

    def marks(self) -> Marks:
        """Returns the seal over all added entries. Call it once."""
        self._take()
        return {_SEAL: [int(self._state, 16)]}

    def _take(self) -> None:
        self._state = hexdigest(self._state.encode() + self._pending)
        self._pending.clear()


def count_on(snapshot_dirfd: int) -> bool:
    """Returns whether marks mean something on the file system of the snapshot. Raises OSError."""
    return filesystem.magic(snapshot_dirfd) in _LOCAL


def settled(status: os.stat_result, hashed_ns: int) -> bool:
    """Returns whether a later change would show. hashed_ns: Unix time before reading it."""
    steps = SETTLED_NS if status.st_ctime_ns % 1_000_000_000 else _COARSE_NS
    return status.st_ctime_ns < hashed_ns - steps


def now_ns() -> int:
    """Returns the time of the clock from which change times come."""
    return time.time_ns()


def read(snapshot: str, part: str, directory: str = VERIFIED) -> Marks:
    """Returns the marks of a part; none when no file is readable."""
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
    """Remove the marks of a removed snapshot. Raises OSError, not when there are no marks."""
    place = f"{directory}/{snapshot}"
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(place):
            replace.take_away(f"{place}/{name}")
        os.rmdir(place)


def first_changed(snapshot_dirfd: int, marks: Marks) -> str | None:
    """Returns the first path whose inode does not match its mark; None when all match."""
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
    """Returns whether all of rootfs/ or shm/ is unchanged since `known` was written.

    tick: called for each directory; an exception from `tick` ends the work.
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
    """Walk in the order of `tree.walk`, but look only for the seal: a pod waits for this."""
    tick()
    add, look, is_directory = seal.add, os.stat, stat.S_ISDIR
    names: list[str] = os.listdir(dirfd)
    names.sort(key=None if "".join(names).isascii() else os.fsencode)
    for name in names:
        add(status := look(name, dir_fd=dirfd, follow_symlinks=False))
        if is_directory(status.st_mode):
            with OwnedFd(os.open(name, O_WALK, dir_fd=dirfd)) as inner:
                _add_directory(seal, inner.fileno(), tick)
