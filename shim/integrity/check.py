"""Checks before each use that a snapshot is, to the byte, as its manifest says. Lean.

The manifest has the digests of the listings; a listing has the digests of all content in its part.
The check reads the small images, the only images that CRIU parses, into memory, hashes them, and
the restore uses the bytes in memory. The check hashes big images and the files of rootfs/ and
shm/, unless they have a mark (see `shim.integrity.marks`) or the kernel vouches for them with
fs-verity. Hashing goes on beside the caller's other steps from `begin` to `finish`. The content of
/dev/shm is an exception: other containers of the pod see it as soon as the restore puts it there,
so `begin` returns only when that content is checked.
"""

from __future__ import annotations

import contextlib
import errno
import os
from functools import partial

from shim.contract.errors import SnapshotNotWhole
from shim.contract.parts import BESIDE, CRIU, FIRST, MEMORY, PARTS, READ, checked
from shim.contract.paths import SNAPSHOT_MANIFEST, SNAPSHOT_SIGNATURE, VERIFIED
from shim.integrity import chunks, content, marks, tree
from shim.integrity.listing import Listing
from shim.integrity.tree import Mismatch, Replaced
from shim.integrity.work import Work
from shim.kernel.beneath import open_beneath

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from shim.contract.manifest import Manifest
    from shim.contract.parts import SnapshotPart
    from shim.integrity.marks import Marks
    from shim.integrity.tree import Entry, Line
    from shim.kernel.fds import OwnedFd

_TOP = {
    SNAPSHOT_MANIFEST, SNAPSHOT_SIGNATURE, *(part.name for part in PARTS),
    *(part.listing for part in PARTS),
}  # fmt: skip
_MUCH_BYTES = 8 << 20
"""From this size on, threads are worth their start."""


_DAMAGE = (
    *content.UNREADABLE, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EXDEV,
    errno.ENXIO, errno.EFBIG, errno.EINVAL,
)  # fmt: skip
"""The errors that show that a file is not of the kind, or the size, that it must be."""


class Unchecked:
    """A data file whose user must check the content.

    path: beneath the snapshot's directory. digests: of the file's chunks; None when nobody needs to
    check the content, because the file has a mark or the kernel vouches for it.
    """

    __slots__ = ("_identity", "digests", "path", "size")

    def __init__(self, entry: Entry, digests: list[str] | None) -> None:
        self.path, self.size, self.digests = entry.below, entry.status.st_size, digests
        self._identity = tree.identity(entry.status)

    def open(self, snapshot_dirfd: int) -> OwnedFd:
        """Returns the open file. Raises OSError; Mismatch if another file has replaced it."""
        file = open_beneath(snapshot_dirfd, tree.raw(self.path), os.O_RDONLY | os.O_NONBLOCK)
        self.unchanged(file.fileno())
        return file

    def unchanged(self, fd: int) -> None:
        """Raises Mismatch if the file changed since the walk looked at it; OSError."""
        if tree.identity(os.fstat(fd)) != self._identity:
            raise Replaced(tree.printable(self.path))

    @property
    def mark(self) -> list[int]:
        """The mark for the file, for a caller that has checked all of the content."""
        return list(self._identity)


class SnapshotCheck:
    """A check, from `begin` to `finish`; leaving the context abandons unfinished work.

    snapshot_dirfd: must stay open. captured: the manifest, already authenticated. container: for
    messages. until: the deadline on `time.monotonic`. with_marks: whether marks and fs-verity spare
    hashing.

    images: the checked content of CRIU's small images by name. big_images: the names of all other
    images. memory: the checked content of the small files of memory/ by name. unchecked: the data
    files of memory/, with `defer_memory`. All are complete after `begin`. hashed_bytes: the size of
    the hashed files; a big file counts as soon as its hashing is due.
    """

    def __init__(
        self,
        snapshot_dirfd: int,
        captured: Manifest,
        *,
        container: str,
        until: float,
        with_marks: bool = True,
        marks_directory: str = VERIFIED,
        defer_memory: bool = False,
    ) -> None:
        self._defer_memory = defer_memory
        self.snapshot_dirfd = snapshot_dirfd
        self._captured, self._container = captured, container
        self._work = Work(until)
        self._with_marks, self._marks_directory = with_marks, marks_directory
        self._marks_count = False
        self._used: dict[str, Marks] = {}
        self._fresh: dict[str, Marks] = {}
        self.images: dict[str, bytes] = {}
        self.big_images: list[str] = []
        self.memory: dict[str, bytes] = {}
        self.unchecked: dict[str, Unchecked] = {}
        self.hashed_bytes = self._image_bytes = 0

    def __enter__(self) -> SnapshotCheck:
        return self

    def __exit__(self, *_: object) -> None:
        self._work.stop()

    def begin(self) -> None:
        """Check the small files and /dev/shm's content, and begin with the rest.

        Raises SnapshotNotWhole; TooLate; OSError if the snapshot is not at fault.
        """
        with self._border():
            self._marks_count = marks.count_on(self.snapshot_dirfd)
            self._check_top()
            for part in checked(FIRST):
                if not self._is_marked(part):
                    self._check_part(part)
            self._run_when_worth_it(self.hashed_bytes)
            self._work.finish()
            self._work = self._work.again()
            for part in checked(READ):
                self._check_part(part)
            due = self.hashed_bytes
            for part in checked(BESIDE):
                if not self._is_marked(part):
                    self._work.add(partial(self._check_part, part))
                    due += self._captured.sizes.of(part)
            self._run_when_worth_it(due)

    def finish(self) -> None:
        """Wait until everything is checked, and write the marks. Raises as `begin` does."""
        with self._border():
            self._work.finish()
        for part, found in self._fresh.items() if self._marks_count else ():
            # Without marks the next use hashes the files again: no reason to fail.
            with contextlib.suppress(OSError):
                marks.write(self._captured.id, part, found, self._marks_directory)

    def unchanged(self) -> None:
        """Make sure that the files that CRIU and /dev/shm got by path are still the checked files.

        Raises SnapshotNotWhole.
        """
        path = marks.first_changed(self.snapshot_dirfd, self._used.get(CRIU.name, {}))
        for part in checked(FIRST) if path is None else ():
            seal = self._used.get(part.name)
            if seal and not marks.is_sealed(self.snapshot_dirfd, part.name, seal):
                path = part.name
        if path is not None:
            raise self._not_whole(
                Mismatch(tree.printable(path), "the file that was checked", "another file")
            )

    def _run_when_worth_it(self, size: int) -> None:
        if self._work.is_due and size > _MUCH_BYTES:
            self._work.start()

    def _check_top(self) -> None:
        for name in sorted(os.listdir(self.snapshot_dirfd)):
            if name not in _TOP:
                raise Mismatch(tree.printable(name), "no such file", "a file")

    def _is_marked(self, part: SnapshotPart) -> bool:
        """Returns whether nothing in a tree has changed since a check."""
        known = self._known(part)
        if not marks.is_sealed(self.snapshot_dirfd, part.name, known, self._work.tick):
            return False
        self._used[part.name] = known
        return True

    def _known(self, part: SnapshotPart) -> Marks:
        if not (self._with_marks and self._marks_count):
            return {}
        return marks.read(self._captured.id, part.name, self._marks_directory)

    def _check_part(self, part: SnapshotPart) -> None:
        """Check a part, except the hashing that is left to the threads."""
        known = {} if part.is_tree else self._known(part)
        found = marks.Marker(part)
        with self._listing(part) as listing:
            for line, entry in tree.pairs(part, listing, tree.walk(self.snapshot_dirfd, part)):
                self._work.tick()
                mark = list(tree.identity(entry.status)) if known else None
                is_marked = mark is not None and known.get(entry.below) == mark
                self._check_entry(line, entry, is_marked=is_marked)
                if tree.is_marked(entry):
                    found.add(entry)
        if part is MEMORY and self._defer_memory:
            return  # the server that checks the content writes the mark
        self._used[part.name] = found.marks
        if (fresh := found.settled) != known:
            self._fresh[part.name] = fresh

    def _check_entry(self, line: Line, entry: Entry, *, is_marked: bool) -> None:
        is_flat = not entry.part.is_tree and entry.depth
        if is_flat and self._is_taken(line, entry, is_marked=is_marked):
            return
        if not entry.is_content or is_marked:
            return
        size = entry.status.st_size
        if self._with_marks and content.kernel_vouches(line, entry):
            return
        self.hashed_bytes += size
        if size > chunks.CHUNK_BYTES:
            content.check_later(line, entry, self.snapshot_dirfd, self._work)
        else:
            content.check_here(line, entry, self._work)

    def _is_taken(self, line: Line, entry: Entry, *, is_marked: bool) -> bool:
        """Take a file of a flat part. Returns whether nothing of its content is left to check."""
        if not entry.is_content or entry.depth > 1:
            # CRIU would follow a directory or link `parent` into other snapshots.
            raise Mismatch(tree.printable(entry.below), entry.part.flat, "something else")
        if entry.part is CRIU:
            self._check_image(line, entry)
            return entry.path in self.images
        if not tree.is_data(entry.path):
            self.memory[entry.path] = content.read(line, entry)
            return True
        if self._defer_memory:
            self._defer(line, entry, is_marked=is_marked)
        return self._defer_memory

    def _defer(self, line: Line, entry: Entry, *, is_marked: bool) -> None:
        if len(line.digests) != chunks.count(entry.status.st_size):
            raise Mismatch(tree.printable(entry.below), "a digest for each chunk", "another number")
        vouched = is_marked or (self._with_marks and content.kernel_vouches(line, entry))
        self.unchecked[entry.path] = Unchecked(entry, None if vouched else line.digests)

    def _check_image(self, line: Line, entry: Entry) -> None:
        if tree.is_marked(entry):
            self.big_images.append(entry.path)
        else:
            self._image_bytes += entry.status.st_size
            if self._image_bytes > tree.MOST_IMAGE_BYTES:
                raise Mismatch(
                    tree.printable(entry.below), f"{tree.MOST_IMAGE_BYTES} bytes of small images",
                    "more",
                )  # fmt: skip
            self.images[entry.path] = content.read(line, entry)

    @contextlib.contextmanager
    def _listing(self, part: SnapshotPart) -> Iterator[Listing]:
        """Yields the listing; the manifest means it if the `with` ends without an error.

        The check uses each line before the whole listing is known to be right. That is safe because
        nobody uses the results if the check as a whole fails.
        """
        with Listing(self.snapshot_dirfd, part, self._captured) as listing:
            try:
                yield listing
            except (Mismatch, ValueError):
                listing.finish()  # names a changed listing as the cause, if there is such a change
                raise
            listing.finish()

    @contextlib.contextmanager
    def _border(self) -> Iterator[None]:
        try:
            yield
        except Mismatch as mismatch:
            raise self._not_whole(mismatch) from mismatch
        except OSError as error:
            if error.errno not in _DAMAGE:
                raise  # no memory, no descriptors: the error says nothing about the snapshot
            raise self._cannot(f"cannot read the snapshot: {error}") from error
        except (ValueError, RecursionError) as error:
            raise self._cannot(f"cannot read the snapshot: {error}") from error

    def _not_whole(self, mismatch: Mismatch) -> SnapshotNotWhole:
        return self._cannot(str(mismatch))

    def _cannot(self, why: str) -> SnapshotNotWhole:
        short = self._captured.id[:12]
        return SnapshotNotWhole(
            "cannot use the snapshot", about=self._container, why=f"{short}: {why}",
            do=f"Run `quickthaw rm {short}`; the next pod makes a new one.",
        )  # fmt: skip
