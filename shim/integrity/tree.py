"""The listing of one part of a snapshot: every entry with all that a restored container sees of it.

    [2,"motd",33188,0,0,1700000000000000000,12,{"user.a":"00ff"},0,["9f86…"],""]

One line an entry: depth and name, mode with its type, owner, group, modification time in
nanoseconds, then the size of a file, the number of a device or the target of a link; the xattrs in
hexadecimal; the number of the line of the first entry that is the same inode, or 0; the digests of
the chunks; the fs-verity digest. Directories come before what is in them, names in the order of
their bytes, the part's own directory first as `.` with depth 0: so the depth says which directory
an entry is in, and no line has a path. Names are bytes: what is no UTF-8 is written with surrogate
escapes. A part that does not exist has an empty listing.

Access times, and sizes and link counts of directories, are not listed: they differ between file
systems and change by themselves. Nor are the modification times of images, which nobody reads.
Lean.
"""

from __future__ import annotations

import errno
import os
import stat

from shim.contract import jsontext
from shim.contract.limits import MAX_DEPTH, MAX_ENTRIES, MAX_PATH_BYTES
from shim.contract.paths import SNAPSHOT_CRIU, SNAPSHOT_MEMORY
from shim.kernel.beneath import O_WALK
from shim.kernel.fds import OwnedFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    Attributes = list[object]
    """What `attributes` gives: the first nine fields of a line."""

MAX_LINE_BYTES = 64 << 20
"""The line of a file of 3.5 TiB."""
BIG_BYTES = 1 << 20
"""From here on an image of CRIU's is checked where it lies; smaller ones are used from memory."""
DATA_IMAGES, BIG_DATA_BYTES = ("ghost-file-", "pages-"), 64 << 10
"""Images of content, behind a head of a few bytes: of these already from here on. A container can
have very many of them, one for each deleted file that it has open.
"""
MOST_IMAGE_BYTES = 32 << 20
"""How much all smaller ones of a snapshot may be together: restores hold them in memory."""
IN_MEMORY = ("files.img",)
"""Images that the swap patches: from memory whatever their size."""
DATA_SUFFIX = ".data"
ROOT = "."
_FIELDS = (
    "depth", "name", "mode", "owner", "group", "mtime", "size, device or target", "xattrs", "link",
)  # fmt: skip
_TIME = _FIELDS.index("mtime")
_O_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FIELD_COUNT = 11
_MOST_ENTRIES = 2 * MAX_ENTRIES
"""A capture ends earlier: names that CRIU looks for come on top."""


class Mismatch(Exception):
    """The snapshot is not what its listing says. path: beneath the snapshot's directory."""

    def __init__(self, path: str, expected: str, found: str) -> None:
        super().__init__(path, expected, found)
        self.path, self.expected, self.found = path, expected, found


class Entry:
    """One entry as it lies on the disk.

    part: `criu`, `rootfs` or `shm`. depth: of its name beneath the part, 0 for the part's own
    directory. status: its lstat. dirfd, name: where it is, valid until the walk goes on. number:
    of its line in the listing, from 1. link: the number of the first entry that is the same inode,
    or 0.
    """

    __slots__ = ("_prefix", "depth", "dirfd", "link", "name", "number", "part", "status")

    def __init__(
        self, part: str, prefix: bytes, depth: int, status: os.stat_result, dirfd: int,
        name: bytes, number: int,
    ) -> None:  # fmt: skip
        """prefix: the path of its directory beneath the part, with a slash at its end, or empty."""
        self.part, self._prefix, self.depth, self.status = part, prefix, depth, status
        self.dirfd, self.name, self.number, self.link = dirfd, name, number, 0

    @property
    def path(self) -> str:
        """Its path beneath the part."""
        return text(self._prefix + self.name)

    @property
    def below(self) -> str:
        """Its path beneath the snapshot's directory."""
        return f"{self.part}/{self.path}" if self.depth else self.part

    @property
    def is_content(self) -> bool:
        """Whether it has content of its own to be checked."""
        return stat.S_ISREG(self.status.st_mode) and not self.link

    def attributes(self) -> Attributes:
        """Everything but the content. Raises OSError."""
        status = self.status
        mtime_ns = 0 if self.part == SNAPSHOT_CRIU else status.st_mtime_ns
        return [
            self.depth, text(self.name), status.st_mode, status.st_uid, status.st_gid, mtime_ns,
            self._value(), self._xattrs(), self.link,
        ]  # fmt: skip

    def open(self) -> OwnedFd:
        """The regular file. Raises OSError, Mismatch when another one is in its place now."""
        fd = OwnedFd(os.open(self.name, _O_FILE, dir_fd=self.dirfd))
        if identity(os.fstat(fd.fileno())) != identity(self.status):
            fd.close()
            raise Mismatch(printable(self.below), "one file", "another meanwhile")
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
    """Whether the entry may have a mark instead of being read again.

    CRIU's small images never: they are read at each use in any case (see `shim.integrity.check`).
    """
    if entry.part == SNAPSHOT_MEMORY:
        return is_data(text(entry.name))
    return entry.part != SNAPSHOT_CRIU or (
        entry.is_content and is_big_image(text(entry.name), entry.status.st_size)
    )


def is_big_image(name: str, size: int) -> bool:
    """Whether an image of CRIU's is checked where it lies, instead of being used from memory."""
    least = BIG_DATA_BYTES if name.startswith(DATA_IMAGES) else BIG_BYTES
    return size >= least and name not in IN_MEMORY


def is_data(name: str) -> bool:
    """Whether a file of memory/ is one of content, which nobody parses."""
    return name.endswith(DATA_SUFFIX)


def text(raw: bytes) -> str:
    """Bytes as the text that stands for them, whatever the locale."""
    return raw.decode("utf-8", "surrogateescape")


def raw(path: str) -> bytes:
    """The reverse of `text`."""
    return path.encode("utf-8", "surrogateescape")


def identity(status: os.stat_result) -> tuple[int, ...]:
    """What stays only while an inode and its content do: ctime cannot be set."""
    return (
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )  # fmt: skip


def walk(snapshot_dirfd: int, part: str) -> Iterator[Entry]:
    """Every entry of the directory `part`, in the order of a listing; none when it is missing.

    Raises OSError; Mismatch for what no listing can say: another file system below it, links to
    its files from elsewhere, more or deeper directories than `shim.contract.limits` lets it have.
    """
    try:
        root = OwnedFd(os.open(part, O_WALK, dir_fd=snapshot_dirfd))
    except FileNotFoundError:
        return
    with root:
        status = os.fstat(root.fileno())
        walked = _Walk(part, os.fstat(snapshot_dirfd).st_dev)
        yield walked.entry(b"", 0, status, root.fileno(), b".")
        yield from walked.directory(root.fileno(), b"", 1)
        if number := walked.linked_elsewhere():
            found = next(each for each in walk(snapshot_dirfd, part) if each.number == number)
            raise Mismatch(printable(found.below), "names in its part only", "one elsewhere")


class _Walk:
    """One walk; remembers the inodes that have several names, by the first one's number."""

    def __init__(self, part: str, device: int) -> None:
        self._part, self._device = part, device
        self._entries = 0
        self._links: dict[int, list[int]] = {}

    def directory(self, dirfd: int, prefix: bytes, depth: int) -> Iterator[Entry]:
        """All that is in the directory `dirfd`, whose path with a slash is `prefix`."""
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
        """The next one. Raises Mismatch for one too many, and for what is mounted there."""
        self._entries += 1
        if self._entries > _MOST_ENTRIES:
            raise Mismatch(self._part, f"{_MOST_ENTRIES} entries at most", "more")
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
        """The number of a file with a name elsewhere, where it can be changed; 0: there is none."""
        return next((number for number, left in self._links.values() if left), 0)


def encode(attributes: Attributes, digests: list[str], verity: str) -> bytes:
    """One line. Raises ValueError when it could not be read again."""
    line = jsontext.canonical([*attributes, digests, verity]).encode() + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"the file {attributes[1]!r:.80} is too large for a listing")
    return line


class Line:
    """One entry as it is listed."""

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
    part: str, listing: Iterable[bytes], found: Iterable[Entry]
) -> Iterator[tuple[Line, Entry]]:
    """Each entry of the disk with its line, all attributes compared, contents not.

    Raises Mismatch at the first that is not as listed, is not listed, or is missing; at the end
    when nothing but a time differs, which tells less. ValueError when the listing is none; OSError.
    """
    lines = map(Line, listing)
    late: Mismatch | None = None
    before: list[str] = []
    for entry in found:
        line = next(lines, None)
        # One after the other: as long as depths and names are equal, so are the paths.
        if line is None or line.depth != entry.depth or line.name != text(entry.name):
            raise _unpaired(part, before, line, entry)
        # JSON has no tuples, and True == 1: what is compared was made by the same code.
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


def _unpaired(part: str, before: list[str], line: Line | None, entry: Entry) -> Mismatch:
    here = [] if not entry.depth else raw(entry.path).split(b"/")
    if line is not None and [raw(name) for name in _path(before, line)] < here:
        return _missing(part, before, line)
    return Mismatch(printable(entry.below), "no such file", "one")


def _missing(part: str, before: list[str], line: Line) -> Mismatch:
    return Mismatch(place(part, "/".join(_path(before, line)) or ROOT), "it as listed", "nothing")


def _path(before: list[str], line: Line) -> list[str]:
    """The parts of a line's path. before: those of the entry before it. Raises ValueError."""
    if not 0 <= line.depth <= len(before) + 1:
        raise ValueError("a line of no directory")
    return [*before[: line.depth - 1], line.name] if line.depth else []


def _but_for_time(listed: Attributes, found: Attributes) -> bool:
    return listed[:_TIME] + listed[_TIME + 1 :] == found[:_TIME] + found[_TIME + 1 :]


def _differs(entry: Entry, listed: Attributes, found: Attributes) -> Mismatch:
    """Names the first attribute that differs, as people know it; the time last."""
    where = printable(entry.below)
    for name, one, other in sorted(
        zip(_FIELDS, listed, found, strict=True), key=lambda field: field[0] == "mtime"
    ):
        if one != other:
            return Mismatch(where, f"{name} {_shown(name, one)}", _shown(name, other))
    raise AssertionError("not reached")


def _shown(name: str, value: object) -> str:
    return oct(value) if name == "mode" and isinstance(value, int) else printable(f"{value!s:.200}")


def place(part: str, path: str) -> str:
    """How a message names an entry of a part."""
    return printable(part if path == ROOT else f"{part}/{path}")


def printable(path: str) -> str:
    """A path for messages, escaped: a container chose the name."""
    return path.encode("unicode_escape", "backslashreplace").decode()
