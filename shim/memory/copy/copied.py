"""The result of copying memory, for the modules that make a snapshot. See `memorycopy`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shim.memory.extents import Extents

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from shim.criu.pagemap import Pagemap
    from shim.kernel.othermemory import Range
    from shim.kernel.smaps import FlaggedArea
    from shim.memory.extents import Extent


@dataclass(frozen=True, slots=True)
class CopiedSpace:
    """An address space or object of shared memory. Its addresses are the offsets in the object.

    number: CRIU's, of the process or object. data: the file of the copy. pages: CRIU's list.
    content: the place in the file, by address; zeros: the ranges of zeros, which the file does not
    have. areas: the flags of a process's areas, if CRIU does not know all of them.
    """

    number: int
    data: Path
    pages: Pagemap
    content: list[Extent]
    zeros: list[Range]
    areas: Sequence[FlaggedArea] = ()


@dataclass(frozen=True, slots=True)
class CopiedMemory:
    """spaces: of processes. shared: objects of shared memory."""

    spaces: list[CopiedSpace]
    shared: list[CopiedSpace]


class Content:
    """Looks up in a copy the content of the pages that CRIU lists."""

    def __init__(self, space: CopiedSpace) -> None:
        self._space = space
        self._content = Extents(space.content)
        self._zeros = Extents((start, end, 0) for start, end in space.zeros)

    def of(self, start: int, end: int) -> list[Extent]:
        """Returns the content except zeros. Raises ValueError if a part was not copied."""
        found = self._content.within(start, end)
        if _size(found) + _size(self._zeros.within(start, end)) != end - start:
            space = self._space
            raise ValueError(f"{space.data.stem}: not all of {start:#x} was copied")
        return found


def _size(extents: list[Extent]) -> int:
    return sum(end - start for start, end, _ in extents)
