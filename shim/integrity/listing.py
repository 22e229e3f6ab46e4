"""Reads a listing of a snapshot line by line, and hashes the lines on the way. Lean."""

from __future__ import annotations

import errno
import os
import stat

from shim.contract.limits import MAX_LISTING_BYTES
from shim.integrity.tree import MAX_LINE_BYTES, Mismatch
from shim.kernel.beneath import open_beneath
from shim.kernel.sha256 import Running

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO, Self

    from shim.contract.manifest import Manifest
    from shim.contract.parts import SnapshotPart


class Listing:
    """The lines of a part's listing. `finish` raises unless it is the listing that was signed."""

    def __init__(self, snapshot_dirfd: int, part: SnapshotPart, captured: Manifest) -> None:
        self._dirfd, self._name = snapshot_dirfd, part.listing
        (self._listed,) = (file for file in captured.files if file.path == self._name)
        self._digest, self._size = Running(self._listed.size), 0
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        """Raises Mismatch, OSError."""
        expected = f"{self._listed.size} bytes"
        if self._listed.size > MAX_LISTING_BYTES:
            raise Mismatch(self._name, f"{MAX_LISTING_BYTES} bytes at most", expected)
        try:
            # O_NONBLOCK: a fifo in the listing's place must not block us.
            fd = open_beneath(self._dirfd, self._name, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            raise Mismatch(self._name, expected, "nothing") from None
        with fd:
            status = os.fstat(fd.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", self._name)
            if status.st_size > self._listed.size:
                raise OSError(errno.EFBIG, f"longer than {self._listed.size} bytes", self._name)
            self._file = os.fdopen(fd.steal(), "rb")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def __iter__(self) -> Iterator[bytes]:
        """Yields each line. Raises OSError."""
        assert self._file is not None  # noqa: S101 - it was entered
        while line := self._file.readline(MAX_LINE_BYTES + 1):
            self._size += len(line)
            self._digest.update(line)
            yield line

    def finish(self) -> None:
        """Read the rest. Raises Mismatch unless this is the listing that the manifest means."""
        for _ in self:
            if self._size > self._listed.size:
                break  # the file grew meanwhile
        found = self._digest.hexdigest()
        if (self._size, found) != (self._listed.size, self._listed.sha256):
            raise Mismatch(self._name, f"SHA-256 {self._listed.sha256[:16]}", found[:16])
