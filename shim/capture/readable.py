"""What a copy of memory is read from: the address space of a process, or an object of shared
memory, whose addresses are the offsets in it. For `spacecopy`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from shim.kernel import othermemory
from shim.kernel.othermemory import Reader, Watch
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
        """What there is, and can be copied while it changes."""

    def areas(self) -> Sequence[Range] | None:
        """Where what was copied may be brought up to date; None: everywhere."""
        return None

    @abstractmethod
    def read(self, wanted: array[int], size: int, buffer: Buffer) -> int:
        """Read ranges, one behind the other; how many bytes were there.

        wanted: of `othermemory.vectors`. It ends at the first range that cannot be read.
        """

    @abstractmethod
    def read_forced(self, start: int, view: memoryview) -> int:
        """Read what was not there for `read`; how much was there."""

    def watch(self) -> None:  # noqa: B027  nobody can tell who writes to an object
        """Note what is written from now on, where the kernel does."""

    def is_as_it_was(self, ranges: Iterable[Range]) -> bool:
        """Whether it is known that nothing was written there."""
        del ranges
        return False

    def close(self) -> None:  # noqa: B027
        """Read no more."""


class OfProcess(Readable):
    """A process's own memory."""

    def __init__(self, pid: int, number: int) -> None:
        self._pid, self.name = pid, f"process {number}"
        self._reader = Reader(pid)
        self._watch: Watch | None = None

    def pages(self) -> Iterator[Range]:
        """As Readable's."""
        return othermemory.pages(self._pid, self.areas())

    def areas(self) -> Sequence[Range]:
        """As Readable's."""
        return othermemory.own_areas(self._pid)

    def read(self, wanted: array[int], size: int, buffer: Buffer) -> int:
        """As Readable's."""
        try:
            return self._reader.read(wanted, size, buffer)
        except ProcessLookupError:
            return 0

    def read_forced(self, start: int, view: memoryview) -> int:
        """As Readable's: also what the process itself cannot read."""
        return othermemory.read_forced(self._pid, start, view)

    def watch(self) -> None:
        """As Readable's."""
        if othermemory.can_watch():
            self._watch = Watch(self._pid)

    def is_as_it_was(self, ranges: Iterable[Range]) -> bool:
        """As Readable's."""
        return self._watch is not None and self._watch.is_as_it_was(ranges)

    def close(self) -> None:
        """As Readable's."""
        self._reader.close()
        if self._watch:
            self._watch.close()


class OfObject(Readable):
    """An object of shared memory."""

    def __init__(self, path: str, number: int) -> None:
        self._object, self.name = OpenObject(path), f"shared memory {number}"

    def pages(self) -> Iterator[Range]:
        """As Readable's."""
        return self._object.pages()

    def read(self, wanted: array[int], size: int, buffer: Buffer) -> int:
        """As Readable's."""
        words, done = iter(wanted), 0
        for start, length in zip(words, words, strict=True):
            got = self._object.read(start, buffer.view[done : done + length])
            done += got
            if got < length:
                break
        return done

    def read_forced(self, start: int, view: memoryview) -> int:
        """As Readable's."""
        return self._object.read(start, view)

    def close(self) -> None:
        """As Readable's."""
        self._object.close()
