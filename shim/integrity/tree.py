"""The listing of a part of a snapshot: every entry with all that a restored container sees of it.

    [2,"motd",33188,0,0,1700000000000000000,12,{"user.a":"00ff"},0,["9f86…"],""]

A line for each entry: depth and name, mode with its type, owner, group, modification time in
nanoseconds, then the size of a file, the number of a device or the target of a link; the xattrs in
hexadecimal; the number of the line of the first entry with the same inode, or 0; the digests of the
chunks; the fs-verity digest. A directory comes before its content, names come in the order of their
bytes, and the part's own directory comes first as `.` with depth 0. So the depth says which
directory an entry is in, and no line has a path. Names are bytes: a line has surrogate escapes for
bytes that are not UTF-8. A part that does not exist has an empty listing.

A listing has no access times, and no sizes and link counts of directories: they differ between file
systems and change by themselves. Nor has it the modification times of images, which nobody reads.
Lean.
"""

from __future__ import annotations

import errno
import os
import stat

from shim.contract import jsontext, parts
from shim.contract.limits import MAX_DEPTH, MAX_ENTRIES, MAX_PATH_BYTES
from shim.contract.paths import DATA_SUFFIX
from shim.kernel.beneath import O_WALK
from shim.kernel.fds import OwnedFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from shim.contract.parts import SnapshotPart

    Attributes = list[object]
    """The result of `attributes`: the first nine fields of a line."""

MAX_LINE_BYTES = 64 << 20
"""The length of the line of a file of 3.5 TiB."""
BIG_BYTES = 1 << 20
"""From this size on, an image is checked in its place; smaller images are used from memory."""
DATA_IMAGES, BIG_DATA_BYTES = ("ghost-file-", "pages-"), 64 << 10
"""Images of content, behind a header of a few bytes: these count as big from this smaller size on.
A container can have very many of them, one for each deleted file that it has open.
"""
MOST_IMAGE_BYTES = 32 << 20
"""The limit for all smaller images of a snapshot together: restores hold them in memory."""
IN_MEMORY = ("files.img",)
"""Images that the swap patches: used from memory whatever their size."""
ROOT = "."
_FIELDS = (
    "depth", "name", "mode", "owner", "group", "mtime", "size, device or target", "xattrs", "link",
)  # fmt: skip
_TIME = _FIELDS.index("mtime")
_O_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FIELD_COUNT = 11
_MOST_ENTRIES = 2 * MAX_ENTRIES
"""A capture has a lower limit: the names that CRIU looks for come on top."""


class Mismatch(Exception):
    """The snapshot differs from its listing. path: beneath the snapshot's directory."""

    def __init__(self, path: str, expected: str, found: str) -> None:
        super().__init__(path, expected, found)
        self.path, self.expected, self.found = path, expected, found

    def __str__(self) -> str:
        return f"{self.path}: expected {self.expected}, found {self.found}"


class Replaced(Mismatch):
    """Another file is at the path than the file that the walk looked at."""

    def __init__(self, path: str) -> None:
        super().__init__(path, "the same file", "another")

    def __str__(self) -> str:
        return f"{self.path}: the file was replaced while it was being read"


class Entry:
    """An entry as it lies on the disk.

    depth: of the name beneath the part, 0 for the part's own directory. status: the result of
    lstat. dirfd, name: the place, valid until the walk goes on. number: of the entry's line in the
    listing, from 1. link: the number of the first entry with the same inode, or 0.
    """

    __slots__ = ("_prefix", "depth", "dirfd", "link", "name", "number", "part", "status")

    def __init__(
        self,
        part: SnapshotPart,
        prefix: bytes,
        depth: int,
        status: os.stat_result,
        dirfd: int,
        name: bytes,
        number: int,
    ) -> None:
        """prefix: the path of the directory beneath the part, ending in a slash, or empty."""
        self.part, self._prefix, self.depth, self.status = part, prefix, depth, status
        self.dirfd, self.name, self.number, self.link = dirfd, name, number, 0

    @property
    def path(self) -> str:
        """The path beneath the part."""
        return text(self._prefix + self.name)

    @property
    def below(self) -> str:
        """The path beneath the snapshot's directory."""
        return f"{self.part.name}/{self.path}" if self.depth else self.part.name

    @property
    def is_content(self) -> bool:
        """Whether the entry has content of its own to check."""
        return stat.S_ISREG(self.status.st_mode) and not self.link

    def attributes(self) -> Attributes:
        """Returns everything but the content. Raises OSError."""
        status = self.status
        mtime_ns = status.st_mtime_ns if self.part.has_times else 0
        return [
            self.depth, text(self.name), status.st_mode, status.st_uid, status.st_gid, mtime_ns,
            self._value(), self._xattrs(), self.link,
        ]  # fmt: skip

    def open(self) -> OwnedFd:
        """Opens the regular file. Raises OSError, Mismatch if another file has replaced it."""
        fd = OwnedFd(os.open(self.name, _O_FILE, dir_fd=self.dirfd))
        if identity(os.fstat(fd.fileno())) != identity(self.status):
            fd.close()
            raise Replaced(printable(self.below))
        return fd

    def _value(self) -> int | str:
        mode = self.status.st_mode
        if stat.S_ISREG(mode):
            return self.status.st_size
        if stat.S_ISLNK(mode):
            return text(os.readlink(self.name, dir_fd=self.dirfd))
        return self.status.st_rdev if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else 0

    def _xattrs(self) -> dict[str, str]:
        # The xattr calls take no directory descriptor, but they take a path through one.
        path = b"/proc/self/fd/%d/%s" % (self.dirfd, self.name)
        try:
            names = os.listxattr(path, follow_symlinks=False)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return {}
        return {
            text(os.fsencode(name)): os.getxattr(path, name, follow_symlinks=False).hex()
            for name in sorted(names)
        }


def is_marked(entry: Entry) -> bool:
    """Returns whether the entry may have a mark instead of being read again.

    CRIU's small images have none: every use reads them in any case (see `shim.integrity.check`).
    """
    if entry.part.is_tree:
        return True
    if entry.part is parts.MEMORY:
        return is_data(text(entry.name))
    return entry.is_content and is_big_image(text(entry.name), entry.status.st_size)


def is_big_image(name: str, size: int) -> bool:
    """Returns whether CRIU's image is checked in its place, instead of being used from memory."""
    least = BIG_DATA_BYTES if name.startswith(DATA_IMAGES) else BIG_BYTES
    return size >= least and name not in IN_MEMORY


def is_data(name: str) -> bool:
    """Returns whether a file of memory/ is a data file, which nobody parses."""
    return name.endswith(DATA_SUFFIX)


def text(raw: bytes) -> str:
    """Returns bytes as text, in the same way in every locale."""
    return raw.decode("utf-8", "surrogateescape")


def raw(path: str) -> bytes:
    """Returns the bytes of a text: the reverse of `text`."""
    return path.encode("utf-8", "surrogateescape")


def identity(status: os.stat_result) -> tuple[int, ...]:
    """Returns values that change with an inode or its content: nobody can set the ctime."""
    return (
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )  # fmt: skip


def walk(snapshot_dirfd: int, part: SnapshotPart) -> Iterator[Entry]:
    """Yields every entry of the part's directory, in the order of a listing; none if it is missing.

    Raises OSError; Mismatch for entries that no listing can have: another file system below the
    directory, links to its files from elsewhere, more or deeper directories than
    `shim.contract.limits` allows.
    """
    try:
        root = OwnedFd(os.open(part.name, O_WALK, dir_fd=snapshot_dirfd))
    except FileNotFoundError:
        return
    with root:
        status = os.fstat(root.fileno())
        walked = _Walk(part, os.fstat(snapshot_dirfd).st_dev)
        yield walked.entry(b"", 0, status, root.fileno(), b".")
        yield from walked.directory(root.fileno(), b"", 1)
        if number := walked.linked_elsewhere():
            found = next(each for each in walk(snapshot_dirfd, part) if each.number == number)
            raise Mismatch(printable(found.below), "names in its part only", "a name elsewhere")


class _Walk:
    """A walk; remembers the inodes that have several names, by the number of the first name."""

    def __init__(self, part: SnapshotPart, device: int) -> None:
        self._part, self._device = part, device
        self._entries = 0
        self._links: dict[int, list[int]] = {}

    def directory(self, dirfd: int, prefix: bytes, depth: int) -> Iterator[Entry]:
        """Yields all entries in the directory `dirfd`. prefix: its path, ending in a slash."""
        if depth > MAX_DEPTH + 1 or len(prefix) > MAX_PATH_BYTES:
            where = place(self._part, text(prefix[:80]))
            most = f"{MAX_DEPTH} directories and {MAX_PATH_BYTES} bytes of path at most"
            raise Mismatch(where, most, "more")
        for name in sorted(map(os.fsencode, os.listdir(dirfd))):
            status = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
            entry = self.entry(prefix, depth, status, dirfd, name)
            yield entry
            if stat.S_ISDIR(status.st_mode):
                with OwnedFd(os.open(name, O_WALK, dir_fd=dirfd)) as inner:
                    yield from self.directory(inner.fileno(), prefix + name + b"/", depth + 1)

    def entry(
        self, prefix: bytes, depth: int, status: os.stat_result, dirfd: int, name: bytes
    ) -> Entry:
        """Returns the next entry. Raises Mismatch for too many entries, and for a mount."""
        self._entries += 1
        if self._entries > _MOST_ENTRIES:
            raise Mismatch(self._part.name, f"{_MOST_ENTRIES} entries at most", "more")
        entry = Entry(self._part, prefix, depth, status, dirfd, name, self._entries)
        if status.st_dev != self._device:
            raise Mismatch(printable(entry.below), "the store's file system", "another")
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            self._note_link(entry)
        return entry

    def _note_link(self, entry: Entry) -> None:
        first = self._links.setdefault(entry.status.st_ino, [entry.number, entry.status.st_nlink])
        first[1] -= 1
        if first[0] != entry.number:
            entry.link = first[0]

    def linked_elsewhere(self) -> int:
        """Returns the number of a file that can change by a name elsewhere; 0 if none can."""
        return next((number for number, left in self._links.values() if left), 0)


def encode(attributes: Attributes, digests: list[str], verity: str) -> bytes:
    """Returns a line. Raises ValueError if nobody could read the line again."""
    line = jsontext.canonical([*attributes, digests, verity]).encode() + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"the file {attributes[1]!r:.80} is too large for a listing")
    return line


class Line:
    """An entry as listed."""

    __slots__ = ("attributes", "depth", "digests", "name", "verity")

    def __init__(self, raw: bytes) -> None:
        """Raises ValueError."""
        fields = jsontext.parse(raw)
        if not isinstance(fields, list) or len(fields) != _FIELD_COUNT:
            raise ValueError("a line that is no entry")
        *self.attributes, self.digests, self.verity = fields
        self.depth, self.name = self.attributes[:2]
        if not isinstance(self.name, str) or not isinstance(self.verity, str):
            raise ValueError("a line without a name")
        if not isinstance(self.depth, int) or not isinstance(self.digests, list):
            raise ValueError("a line without depth or digests")


def pairs(
    part: SnapshotPart, listing: Iterable[bytes], found: Iterable[Entry]
) -> Iterator[tuple[Line, Entry]]:
    """Yields each entry of the disk with its line; compares all attributes but not the content.

    Raises Mismatch at the first entry that differs from its line, has no line, or is missing. A
    difference in time alone tells less, so it raises at the end. ValueError when the listing is
    malformed; OSError.
    """
    lines = map(Line, listing)
    late: Mismatch | None = None
    before: list[str] = []
    for entry in found:
        line = next(lines, None)
        # One after the other: as long as depths and names are equal, so are the paths.
        if line is None or line.depth != entry.depth or line.name != text(entry.name):
            raise _unpaired(part, before, line, entry)
        # JSON has no tuples, and True == 1: the same code made both sides of the comparison.
        if line.attributes != (attributes := entry.attributes()):
            mismatch = _differs(entry, line.attributes, attributes)
            late = late or mismatch
            if not _but_for_time(line.attributes, attributes):
                raise mismatch
        yield line, entry
        if entry.depth:
            before[entry.depth - 1 :] = [line.name]
    for line in lines:
        raise _missing(part, before, line)
    if late is not None:
        raise late


def _unpaired(part: SnapshotPart, before: list[str], line: Line | None, entry: Entry) -> Mismatch:
    here = [] if not entry.depth else raw(entry.path).split(b"/")
    if line is not None and [raw(name) for name in _path(before, line)] < here:
        return _missing(part, before, line)
    return Mismatch(printable(entry.below), "no such file", "a file")


def _missing(part: SnapshotPart, before: list[str], line: Line) -> Mismatch:
    return Mismatch(
        place(part, "/".join(_path(before, line)) or ROOT), "the file as listed", "nothing"
    )


def _path(before: list[str], line: Line) -> list[str]:
    """Returns the names in a line's path. before: the previous entry's names. Raises ValueError."""
    if not 0 <= line.depth <= len(before) + 1:
        raise ValueError("a line of no directory")
    return [*before[: line.depth - 1], line.name] if line.depth else []


def _but_for_time(listed: Attributes, found: Attributes) -> bool:
    return listed[:_TIME] + listed[_TIME + 1 :] == found[:_TIME] + found[_TIME + 1 :]


def _differs(entry: Entry, listed: Attributes, found: Attributes) -> Mismatch:
    """Returns a Mismatch with the common name of the first differing attribute; the time last."""
    where = printable(entry.below)
    for name, one, other in sorted(
        zip(_FIELDS, listed, found, strict=True), key=lambda field: field[0] == "mtime"
    ):
        if one != other:
            return Mismatch(where, f"{name} {_shown(name, one)}", _shown(name, other))
    raise AssertionError("not reached")


def _shown(name: str, value: object) -> str:
    return oct(value) if name == "mode" and isinstance(value, int) else printable(f"{value!s:.200}")


def place(part: SnapshotPart, path: str) -> str:
    """Returns the name of an entry of a part for messages."""
    return printable(part.name if path == ROOT else f"{part.name}/{path}")


def printable(path: str) -> str:
    """Returns a path for messages, escaped: a container chose the name."""
    return path.encode("unicode_escape", "backslashreplace").decode()
