"""What a copy of memory has, for those who make a snapshot of it. See `memorycopy`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shim.memory.extents import Extents

if TYPE_CHECKING:
    from pathlib import Path

    from shim.criu.pagemap import Pagemap
    from shim.kernel.othermemory import Range
    from shim.memory.extents import Extent


@dataclass(frozen=True, slots=True)
class Space:
    """One address space or object of shared memory, whose addresses are the offsets in it.

    number: CRIU's, of the process or object. data: its file. pages: what CRIU lists.
    content: where it is in the file, by address; zeros: what is not there, being zeros.
    """

    number: int
    data: Path
    pages: Pagemap
    content: list[Extent]
    zeros: list[Range]


@dataclass(frozen=True, slots=True)
class CopiedMemory:
    """spaces: of processes. shared: objects of shared memory."""

    spaces: list[Space]
    shared: list[Space]


class Content:
    """Looks up in a copy where the content is of what CRIU lists."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self._content = Extents(space.content)
        self._zeros = Extents((start, end, 0) for start, end in space.zeros)

    def of(self, start: int, end: int) -> list[Extent]:
        """But for zeros. Raises ValueError when not all of it was copied."""
        found = self._content.within(start, end)
        if _size(found) + _size(self._zeros.within(start, end)) != end - start:
            space = self._space
            raise ValueError(f"{space.data.stem}: not all of {start:#x} was copied")
        return found


def _size(extents: list[Extent]) -> int:
    return sum(end - start for start, end, _ in extents)
