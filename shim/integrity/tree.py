"""The listing of one part of a snapshot: every entry with all that a restored container sees of it.

    ["etc/motd",33188,0,0,1700000000000000000,12,{"user.a":"00ff"},"",["9f86…"],""]

One line an entry: path, mode with its type, owner, group, modification time in nanoseconds, then
the size of a file, the number of a device or the target of a link; the xattrs in hexadecimal; the
path of the first entry that is the same inode; the digests of the chunks; the fs-verity digest.
Directories come before what is in them, names in the order of their bytes, the part's own
directory first as `.`. Names are bytes: what is no UTF-8 is written with surrogate escapes.
A part that does not exist has an empty listing.

Access times, and sizes and link counts of directories, are not listed: they differ between file
systems and change by themselves. Nor are the modification times of images, which nobody reads.
Lean.
"""

from __future__ import annotations

import errno
import os
import stat

from shim.contract import jsontext
from shim.contract.paths import SNAPSHOT_CRIU, SNAPSHOT_MEMORY
from shim.kernel.beneath import O_WALK
from shim.kernel.fds import OwnedFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    Attributes = list[object]
    """What `attributes` gives: the first eight fields of a line."""

MAX_DEPTH = 250
"""Of directories in a part. Captures copy fewer (see shim.rootfs)."""
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
_FIELDS = ("path", "mode", "owner", "group", "mtime", "size, device or target", "xattrs", "link")
_TIME = _FIELDS.index("mtime")
_O_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FIELD_COUNT = 10


class Mismatch(Exception):
    """The snapshot is not what its listing says. path: beneath the snapshot's directory."""

    def __init__(self, path: str, expected: str, found: str) -> None:
        super().__init__(path, expected, found)
        self.path, self.expected, self.found = path, expected, found


class Entry:
    """One entry as it lies on the disk.

    part: `criu`, `rootfs` or `shm`. path: beneath the part. status: its lstat. dirfd, name: where
    it is, valid until the walk goes on. link: the path of the first entry that is the same inode,
    or empty.
    """

    __slots__ = ("dirfd", "link", "name", "part", "path", "status")

    def __init__(
        self, part: str, path: str, status: os.stat_result, dirfd: int, name: bytes
    ) -> None:  # fmt: skip
        self.part, self.path, self.status = part, path, status
        self.dirfd, self.name, self.link = dirfd, name, ""

    @property
    def below(self) -> str:
        """Its path beneath the snapshot's directory."""
        return self.part if self.path == ROOT else f"{self.part}/{self.path}"

    @property
    def is_content(self) -> bool:
        """Whether it has content of its own to be checked."""
        return stat.S_ISREG(self.status.st_mode) and not self.link

    def attributes(self) -> Attributes:
        """Everything but the content. Raises OSError."""
        status = self.status
        mtime_ns = 0 if self.part == SNAPSHOT_CRIU else status.st_mtime_ns
        return [
            self.path, status.st_mode, status.st_uid, status.st_gid, mtime_ns,
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
        return is_data(entry.path)
    return entry.part != SNAPSHOT_CRIU or (
        entry.is_content and is_big_image(entry.path, entry.status.st_size)
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
    its files from elsewhere, directories too deep.
    """
    try:
        root = OwnedFd(os.open(part, O_WALK, dir_fd=snapshot_dirfd))
    except FileNotFoundError:
        return
    with root:
        status = os.fstat(root.fileno())
        walked = _Walk(part, os.fstat(snapshot_dirfd).st_dev)
        walked.check_device(ROOT, status)
        yield Entry(part, ROOT, status, root.fileno(), b".")
        yield from walked.directory(root.fileno(), b"", 0)
        walked.check_links()


class _Walk:
    """One walk; remembers the names that are one inode."""

    def __init__(self, part: str, device: int) -> None:
        self._part, self._device = part, device
        self._links: dict[int, str] = {}
        self._names_left: dict[str, int] = {}

    def directory(self, dirfd: int, prefix: bytes, depth: int) -> Iterator[Entry]:
        """All that is below the directory `dirfd`, whose path with a slash is `prefix`."""
        if depth > MAX_DEPTH:
            raise Mismatch(
                printable(f"{self._part}/{text(prefix)}"),
                f"{MAX_DEPTH} directories at most",
                "more",
            )
        for name in sorted(map(os.fsencode, os.listdir(dirfd))):
            status = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
            entry = Entry(self._part, text(prefix + name), status, dirfd, name)
            self.check_device(entry.path, status)
            if not stat.S_ISDIR(status.st_mode):
                self._note_link(entry)
                yield entry
                continue
            yield entry
            with OwnedFd(os.open(name, O_WALK, dir_fd=dirfd)) as inner:
                yield from self.directory(inner.fileno(), prefix + name + b"/", depth + 1)

    def check_device(self, path: str, status: os.stat_result) -> None:
        """Something mounted into a snapshot is none of it."""
        if status.st_dev != self._device:
            raise Mismatch(place(self._part, path), "the store's file system", "another")

    def _note_link(self, entry: Entry) -> None:
        if entry.status.st_nlink == 1:
            return
        first = self._links.setdefault(entry.status.st_ino, entry.path)
        if first != entry.path:
            entry.link = first
        left = self._names_left.get(first, entry.status.st_nlink)
        self._names_left[first] = left - 1

    def check_links(self) -> None:
        """A file with a name elsewhere can be changed there."""
        for path, left in self._names_left.items():
            if left:
                raise Mismatch(place(self._part, path), "names in its part only", "one elsewhere")


def encode(attributes: Attributes, digests: list[str], verity: str) -> bytes:
    """One line. Raises ValueError when it could not be read again."""
    line = jsontext.canonical([*attributes, digests, verity]).encode() + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"the file {attributes[0]!r:.80} is too large for a listing")
    return line


class Line:
    """One entry as it is listed."""

    __slots__ = ("attributes", "digests", "path", "verity")

    def __init__(self, raw: bytes) -> None:
        """Raises ValueError."""
        fields = jsontext.parse(raw)
        if not isinstance(fields, list) or len(fields) != _FIELD_COUNT:
            raise ValueError("a line that is no entry")
        *self.attributes, self.digests, self.verity = fields
        self.path = self.attributes[0]
        if not isinstance(self.path, str) or not isinstance(self.verity, str):
            raise ValueError("a line without a path")
        if not isinstance(self.digests, list):
            raise ValueError("a line without digests")


def pairs(
    part: str, listing: Iterable[bytes], found: Iterable[Entry]
) -> Iterator[tuple[Line, Entry]]:
    """Each entry of the disk with its line, all attributes compared, contents not.

    Raises Mismatch at the first that is not as listed, is not listed, or is missing; at the end
    when nothing but a time differs, which tells less. ValueError when the listing is none; OSError.
    """
    lines = map(Line, listing)
    late: Mismatch | None = None
    for entry in found:
        line = next(lines, None)
        if line is None or line.path != entry.path:
            raise _unpaired(part, line, entry)
        # JSON has no tuples, and True == 1: what is compared was made by the same code.
        if line.attributes != (attributes := entry.attributes()):
            late = late or _differs(part, line.attributes, attributes)
            if not _but_for_time(line.attributes, attributes):
                raise _differs(part, line.attributes, attributes)
        yield line, entry
    for line in lines:
        raise Mismatch(place(part, line.path), "it as listed", "nothing")
    if late is not None:
        raise late


def _unpaired(part: str, line: Line | None, entry: Entry) -> Mismatch:
    if line is not None and _order(line.path) < _order(entry.path):
        return Mismatch(place(part, line.path), "it as listed", "nothing")
    return Mismatch(place(part, entry.path), "no such file", "one")


def _order(path: str) -> list[bytes]:
    return [] if path == ROOT else raw(path).split(b"/")


def _but_for_time(listed: Attributes, found: Attributes) -> bool:
    return listed[:_TIME] + listed[_TIME + 1 :] == found[:_TIME] + found[_TIME + 1 :]


def _differs(part: str, listed: Attributes, found: Attributes) -> Mismatch:
    """Names the first attribute that differs, as people know it; the time last."""
    where = place(part, str(found[0]))
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
