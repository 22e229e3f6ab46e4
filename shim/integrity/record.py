"""Writes the listings of a new snapshot into its directory, when the store publishes it.

The content must not change any more: the publisher is the only owner.
"""

from __future__ import annotations

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from shim.contract.limits import MAX_LISTING_BYTES, TooMuch
from shim.contract.manifest import File
from shim.contract.parts import PARTS
from shim.contract.paths import SNAPSHOT_CRIU
from shim.integrity import chunks, marks, tree
from shim.kernel import filesystem

if TYPE_CHECKING:
    from shim.contract.parts import SnapshotPart
    from shim.integrity.marks import Marks
    from shim.integrity.tree import Entry
    from shim.kernel.stopping import Stop

_THREADS = min(4, os.cpu_count() or 1)
_O_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Recorded:
    """files: the listings, for the manifest. marks: of files hashed just now, by part's name."""

    def __init__(self) -> None:
        self.files: list[File] = []
        self.marks: dict[str, Marks] = {}


def record(staged_dirfd: int, stop: Stop) -> Recorded:
    """Read all of a staged snapshot and write its listings. Blocking.

    Enables fs-verity for the big files if the file system has it. Raises OSError; Mismatch for an
    entry that no listing can have; ValueError for a file that is too large for a listing; TooMuch;
    Stopped.
    """
    os.stat(SNAPSHOT_CRIU, dir_fd=staged_dirfd)  # without images this is no snapshot
    _protect(staged_dirfd, stop)
    time.sleep(marks.SETTLED_NS / 1e9)  # so that the files written last get marks, too
    found = Recorded()
    with ThreadPoolExecutor(_THREADS) as threads:
        for part in PARTS:
            recorder = _Recorder(part, threads, stop)
            found.files.append(recorder.write(staged_dirfd))
            found.marks[part.name] = recorder.marker.settled
    return found


def _protect(staged_dirfd: int, stop: Stop) -> None:
    """Enable fs-verity for the big files, before hashing: both digests are of the same content.

    Building the Merkle tree counts as a modification (Linux 6.1, ext4), so this restores the time.
    """
    for part in PARTS:
        for entry in tree.walk(staged_dirfd, part):
            status = entry.status
            stop.check()
            if not entry.is_content or status.st_size < tree.BIG_BYTES:
                continue
            with entry.open() as file:
                if not filesystem.enable_verity(file.fileno()):
                    return
                os.utime(file.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))


class _Recorder:
    """Records a part."""

    def __init__(self, part: SnapshotPart, threads: ThreadPoolExecutor, stop: Stop) -> None:
        self._part, self._threads, self._stop = part, threads, stop
        self.marker = marks.Marker(part)

    def write(self, staged_dirfd: int) -> File:
        name, size, digest = self._part.listing, 0, hashlib.sha256()
        with open(os.open(name, _O_NEW, 0o600, dir_fd=staged_dirfd), "wb") as file:
            for entry in tree.walk(staged_dirfd, self._part):
                self._stop.check()
                line = self._line(entry)
                file.write(line)
                digest.update(line)
                size += len(line)
                if size > MAX_LISTING_BYTES:
                    raise TooMuch(f"bytes of {name}", MAX_LISTING_BYTES)
        return File(path=name, size=size, sha256=digest.hexdigest())

    def _line(self, entry: Entry) -> bytes:
        digests, verity = self._content(entry) if entry.is_content else ([], "")
        if tree.is_marked(entry):
            self.marker.add(entry)
        return tree.encode(entry.attributes(), digests, verity)

    def _content(self, entry: Entry) -> tuple[list[str], str]:
        size = entry.status.st_size
        with entry.open() as file:
            fd = file.fileno()
            verity = filesystem.measure_verity(fd) if size >= tree.BIG_BYTES else ""
            numbers = range(chunks.count(size))
            if len(numbers) == 1:
                return [self._digest(fd, 0, size)], verity
            return list(self._threads.map(lambda i: self._digest(fd, i, size), numbers)), verity

    def _digest(self, fd: int, index: int, size: int) -> str:
        return chunks.digest(fd, index, size, self._stop.check)
