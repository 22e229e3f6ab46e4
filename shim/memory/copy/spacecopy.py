"""Copies an address space or an object of shared memory into a file of pages. For `memorycopy`."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Final

from shim.kernel import othermemory, replace
from shim.kernel.filesystem import write_at
from shim.kernel.hugepages import HUGE_BYTES
from shim.kernel.othermemory import PAGE, Buffer, Mapped
from shim.memory.extents import joined

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from shim.kernel.othermemory import Range
    from shim.memory.copy.readable import Readable

JOB_BYTES: Final = 2 * HUGE_BYTES
"""The bytes to copy at once."""
_BATCH_BYTES = 512 << 10
"""The bytes to compare at once: both sides stay in the processor's cache."""
_ZEROS = -1
_O_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_of_thread = threading.local()


class Batch:
    """Ranges whose content lies in sequence from `offset` on, or is zeros."""

    __slots__ = ("offset", "size", "wanted")

    def __init__(self, wanted: array[int], size: int, offset: int) -> None:
        self.wanted, self.size, self.offset = wanted, size, offset

    def ranges(self) -> Iterator[Range]:
        """Yields the ranges in the order of addresses."""
        words = iter(self.wanted)
        for start, size in zip(words, words, strict=True):
            yield start, start + size


class FileRoom:
    """Allocates places for content in a file. end: the size that the file needs.

    Whole huge pages lie at multiples of the huge page size: content written there at once is a huge
    page in the page cache, and a restore maps it as such. Smaller content goes into the gaps before
    them.
    """

    def __init__(self) -> None:
        self.end = 0
        self._left = (0, 0)

    def take(self, size: int) -> int:
        """Returns the offset for the next `size` bytes."""
        start, end = self._left
        if size and size % HUGE_BYTES == 0:
            begins = -(-self.end // HUGE_BYTES) * HUGE_BYTES
            if begins - self.end > end - start:
                self._left = (self.end, begins)
            self.end = begins + size
            return begins
        if size <= end - start:
            self._left = (start + size, end)
            return start
        self.end += size
        return self.end - size


class SpaceCopy:
    """A copy. memory: its source; closed with the copy. number: CRIU's. Methods raise OSError."""

    def __init__(self, memory: Readable, number: int, path: Path) -> None:
        self.memory, self.number, self.path = memory, number, path
        # A file that is there belongs to a number whose process or object has ended.
        replace.take_away(str(path))
        self._fd = os.open(path, _O_NEW, 0o600)
        self._room = FileRoom()
        self._lock = threading.Lock()
        self._batches: list[Batch] = []
        self._mapped: Mapped | None = None

    @property
    def size(self) -> int:
        """The number of copied bytes."""
        return sum(batch.size for batch in self._batches)

    def close(self) -> None:
        """Close, and keep the file."""
        if self._mapped:
            self._mapped.close()
        self.memory.close()
        os.close(self._fd)

    def discard(self) -> None:
        """Remove the file: the process or object is gone."""
        self.close()
        self.path.unlink()

    def reopen(self, memory: Readable) -> None:
        """Read from `memory` from now on, which may be another object."""
        self.memory.close()
        self.memory = memory

    def map(self) -> None:
        """Map the present content of the file, for `renew`."""
        if self._mapped:
            self._mapped.close()
        self._mapped = Mapped(self._fd, self._room.end)

    def take(self, usable: Callable[[Batch], bool]) -> list[Batch]:
        """Forget the copied batches. Returns the usable batches, for `renew`."""
        found, self._batches = self._batches, []
        return [batch for batch in found if usable(batch)]

    def known(self) -> list[Range]:
        """Returns the copied ranges, in the order of addresses."""
        return sorted(each for batch in self._batches for each in batch.ranges())

    def content(self) -> list[tuple[int, int, int]]:
        """Returns the places in the file: address, address behind the content, offset."""
        found = []
        for batch in self._batches:
            offset = batch.offset
            for start, end in batch.ranges() if offset != _ZEROS else ():
                found.append((start, end, offset))
                offset += end - start
        return joined(sorted(found))

    def zeros(self) -> list[Range]:
        """Returns the ranges of zeros."""
        return sorted(
            each for batch in self._batches if batch.offset == _ZEROS for each in batch.ranges()
        )

    def copy(self, ranges: list[Range], *, forced: bool = False) -> None:
        """Copy ranges, JOB_BYTES at most; leave out memory that cannot be read.

        forced: also read memory that the process itself cannot read. ValueError if some is missing.
        """
        buffer, size = _buffer(), sum(end - start for start, end in ranges)
        got = self.memory.read(othermemory.vectors(ranges), size, buffer)
        if got < size and forced:
            self._read_forced(ranges, got, buffer)
            got = size
        self._keep(_cut(ranges, got // PAGE * PAGE), buffer)

    def renew(self, batch: Batch) -> None:
        """Bring a batch up to date, or forget it if it cannot be read or its zeros have changed."""
        if self.memory.is_as_it_was(batch.ranges()):
            self._batches.append(batch)  # is atomic
            return
        buffer = _buffer()
        if self.memory.read(batch.wanted, batch.size, buffer) < batch.size:
            return
        if batch.offset == _ZEROS:
            if not othermemory.is_zero(buffer.address, batch.size):
                return
        elif not self._is_equal(buffer, batch):
            write_at(self._fd, buffer.view[: batch.size], batch.offset)
        self._batches.append(batch)

    def _is_equal(self, buffer: Buffer, batch: Batch) -> bool:
        assert self._mapped is not None  # noqa: S101 - copied content was mapped
        return othermemory.is_equal(buffer.address, self._mapped.address + batch.offset, batch.size)

    def _read_forced(self, ranges: list[Range], got: int, buffer: Buffer) -> None:
        at = 0
        for start, end in ranges:
            size = end - start
            if at + size > got:
                done = self.memory.read_forced(start, buffer.view[at : at + size])
                if done < size:
                    raise ValueError(
                        f"{self.memory.name}: memory at {start + done:#x} cannot be read"
                    )
            at += size

    def _keep(self, ranges: list[Range], buffer: Buffer) -> None:
        """Write the content, except zeros."""
        size = sum(end - start for start, end in ranges)
        zeros = othermemory.zero_pages(buffer, size)
        data = _between(zeros, size)
        wanted = sum(end - start for start, end in data)
        with self._lock:
            offset = self._room.take(wanted)
        at = offset
        for start, end in data:
            write_at(self._fd, buffer.view[start:end], at)
            at += end - start
        kept = list(_batches(_places(ranges, data), offset))
        kept += _batches(_places(ranges, zeros), _ZEROS)
        self._batches.extend(kept)  # is atomic


def _buffer() -> Buffer:
    """Returns this thread's buffer, of JOB_BYTES."""
    if not hasattr(_of_thread, "buffer"):
        _of_thread.buffer = Buffer(JOB_BYTES)
    found: Buffer = _of_thread.buffer
    return found


def _cut(ranges: list[Range], size: int) -> list[Range]:
    """Returns the first `size` bytes of ranges."""
    found = []
    for start, end in ranges:
        if size <= 0:
            break
        found.append((start, min(end, start + size)))
        size -= end - start
    return found


def _between(holes: list[Range], size: int) -> list[Range]:
    found, at = [], 0
    for start, end in [*holes, (size, size)]:
        if at < start:
            found.append((at, start))
        at = end
    return found


def _places(ranges: Iterable[Range], parts: list[Range]) -> Iterator[Range]:
    """Yields the addresses of parts of a buffer, which has `ranges` in sequence."""
    left = iter(parts)
    part = next(left, None)
    at = 0
    for start, end in ranges:
        while part and part[0] < at + end - start:
            first, behind = max(part[0], at), min(part[1], at + end - start)
            yield start + first - at, start + behind - at
            if part[1] > at + end - start:
                break  # goes on in the next range
            part = next(left, None)
        at += end - start


def _batches(ranges: Iterable[Range], offset: int) -> Iterator[Batch]:
    some: list[Range] = []
    size = 0
    for first, end in ranges:
        start = first
        while start < end:
            stop = min(end, start + _BATCH_BYTES - size)
            some.append((start, stop))
            size, start = size + stop - start, stop
            if size == _BATCH_BYTES:
                yield Batch(othermemory.vectors(some), size, offset)
                offset += size if offset != _ZEROS else 0
                some, size = [], 0
    if some:
        yield Batch(othermemory.vectors(some), size, offset)
