"""The source of a copy of memory: an address space of a process, or an object of shared memory.

In an object of shared memory, addresses are offsets. For `spacecopy`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from shim.kernel import othermemory
from shim.kernel.othermemory import Reader, WriteWatch
from shim.kernel.sharedobjects import OpenObject

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterable, Iterator, Sequence

    from shim.kernel.othermemory import Buffer, Range


class Readable(ABC):
    """name: for messages. Methods raise OSError."""

    name: str

    @abstractmethod
    def pages(self) -> Iterator[Range]:
        """Yields the ranges that exist, and can be copied while they change."""

    def areas(self) -> Sequence[Range] | None:
        """Returns the ranges in which a copy may be brought up to date; None: everywhere."""
        return None

    @abstractmethod
    def read(self, wanted: array[int], size: int, buffer: Buffer) -> int:
        """Read ranges, one behind the other. Returns how many bytes were there.

        wanted: of `othermemory.vectors`. Ends at the first range that cannot be read.
        """

    @abstractmethod
    def read_forced(self, start: int, view: memoryview) -> int:
        """Read memory that `read` could not read. Returns how many bytes were there."""

    def watch(self) -> None:  # noqa: B027  nobody can tell who writes to an object
        """Note all writes from now on, if the kernel does."""

    def is_as_it_was(self, ranges: Iterable[Range]) -> bool:
        """Returns whether the kernel knows that nothing was written there."""
        del ranges
        return False

    def close(self) -> None:  # noqa: B027
        """Stop reading."""


class OfProcess(Readable):
    """The own memory of a process."""

    def __init__(self, pid: int, number: int) -> None:
        self._pid, self.name = pid, f"process {number}"
        self._reader = Reader(pid)
        self._watch: WriteWatch | None = None

    def pages(self) -> Iterator[Range]:
        """Yields as Readable does."""
        return othermemory.pages(self._pid, self.areas())

    def areas(self) -> Sequence[Range]:
        """Returns as Readable does."""
        return othermemory.own_areas(self._pid)

    def read(self, wanted: array[int], size: int, buffer: Buffer) -> int:
        """Read as Readable does."""
        try:
            return self._reader.read(wanted, size, buffer)
        except ProcessLookupError:
            return 0

    def read_forced(self, start: int, view: memoryview) -> int:
        """Read as Readable does: also memory that the process itself cannot read."""
        return othermemory.read_forced(self._pid, start, view)

    def watch(self) -> None:
        """Note writes as Readable does."""
        if othermemory.can_watch():
            self._watch = WriteWatch(self._pid)

    def is_as_it_was(self, ranges: Iterable[Range]) -> bool:
        """Returns as Readable does."""
        return self._watch is not None and self._watch.is_as_it_was(ranges)

    def close(self) -> None:
        """Stop as Readable does."""
        self._reader.close()
        if self._watch:
            self._watch.close()


class OfObject(Readable):
    """An object of shared memory."""

    def __init__(self, path: str, number: int) -> None:
        self._object, self.name = OpenObject(path), f"shared memory {number}"

    def pages(self) -> Iterator[Range]:
        """Returns as Readable does."""
        return self._object.pages()

    def read(self, wanted: array[int], size: int, buffer: Buffer) -> int:
        """Read as Readable does."""
        words, done = iter(wanted), 0
        for start, length in zip(words, words, strict=True):
            got = self._object.read(start, buffer.view[done : done + length])
            done += got
            if got < length:
                break
        return done

    def read_forced(self, start: int, view: memoryview) -> int:
        """Read as Readable does."""
        return self._object.read(start, view)

    def close(self) -> None:
        """Stop as Readable does."""
        self._object.close()
