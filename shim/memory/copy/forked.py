"""Stores pages that processes share since a fork once, so that restored processes share them again.

A page server fills each address space by itself, so pages shared by parent and child would exist
twice. So CRIU restores pages that are equal in both (see `shim.criu.family`): CRIU reads them while
nothing runs yet, which costs about a second for each GiB and process on two cores, and they cost
memory once. Blocking, after the thaw.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from shim.criu import family, pagemap
from shim.kernel import othermemory
from shim.kernel.othermemory import PAGE, Mapped
from shim.memory.copy import datafile
from shim.memory.extents import Extents

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from shim.kernel.othermemory import Range
    from shim.memory.copy.copied import CopiedSpace

WORTH_BYTES: Final = 64 << 20
"""The least saving of a family: below that the page server fills each process' own memory."""
_BLOCK_BYTES = 256 << 10
"""The bytes to compare at once; halved where they differ."""


@dataclass(slots=True)
class Family:
    """A process, and all processes forked from it.

    shared: by pid, the ranges that each process shares with `root`; for the root, the union of all.
    pairs: each parent and its child.
    """

    root: int
    shared: dict[int, Extents] = field(default_factory=dict)
    pairs: list[tuple[int, int]] = field(default_factory=list)

    @property
    def saved_bytes(self) -> int:
        """The bytes that are stored, and need memory, only once."""
        return sum(_size(its) for pid, its in self.shared.items() if pid != self.root)


def families(criu: Path, spaces: Mapping[int, CopiedSpace]) -> Iterator[Family]:
    """Yields the families that save enough. Raises DamagedImage, OSError."""
    children: dict[int, list[int]] = {}
    tree = family.parents(criu)
    for pid, parent in tree:
        children.setdefault(parent, []).append(pid)
    done: set[int] = set()
    for pid, _ in tree:
        if pid in done or pid not in spaces:
            continue
        found = _family(criu, spaces, children, pid)
        if found.saved_bytes >= WORTH_BYTES:
            done |= found.shared.keys()
            yield found


def _family(
    criu: Path, spaces: Mapping[int, CopiedSpace], children: Mapping[int, Sequence[int]], root: int
) -> Family:
    found = Family(root)
    whole = Extents((start, end, 0) for start, end, _ in spaces[root].content)
    due = [(root, child, whole) for child in children.get(root, ())]
    with _Compared(spaces[root]) as compared:
        while due:
            parent, child, has = due.pop()
            if child not in spaces:
                continue
            areas = list(_both(family.inherited(criu, parent, child), has))
            its = Extents(compared.equal(spaces[child], areas) if areas else ())
            if its:
                found.shared[child] = its
                found.pairs.append((parent, child))
                due += [(child, each, its) for each in children.get(child, ())]
    union = Extents()
    for its in found.shared.values():
        union.put(its)
    if found.shared:
        found.shared[root] = union
    return found


def _both(areas: Iterable[Range], has: Extents) -> Iterator[Range]:
    for start, end in areas:
        for first, behind, _ in has.within(start, end):
            yield first, behind


class _Compared:
    """Compares the copy of an address space with other copies."""

    def __init__(self, space: CopiedSpace) -> None:
        self._content, self._data = Extents(space.content), space.data
        self._mapped: Mapped | None = None

    def __enter__(self) -> _Compared:
        return self

    def __exit__(self, *_: object) -> None:
        if self._mapped:
            self._mapped.close()

    def equal(self, other: CopiedSpace, ranges: Iterable[Range]) -> list[tuple[int, int, int]]:
        """Returns the parts of `ranges` with the same content in both copies; joins neighbours."""
        ours_mapped = self._mapped = self._mapped or _mapped(self._data)
        content, mapped = Extents(other.content), _mapped(other.data)
        found: list[tuple[int, int, int]] = []
        try:
            for each in ranges:
                for start, end, ours, theirs in _pairs(self._content, content, each):
                    one, two = ours_mapped.address + ours, mapped.address + theirs
                    for first, behind in _equal(one, two, end - start):
                        if found and found[-1][1] == start + first:
                            found[-1] = found[-1][0], start + behind, 0
                        else:
                            found.append((start + first, start + behind, 0))
        finally:
            mapped.close()
        return found


def _mapped(path: Path) -> Mapped:
    with path.open("r+b") as file:
        return Mapped(file.fileno(), os.fstat(file.fileno()).st_size)


def _pairs(one: Extents, other: Extents, where: Range) -> Iterator[tuple[int, int, int, int]]:
    """Yields addresses for which both have content, and the place in each: in blocks."""
    for start, end, ours in one.within(*where):
        for first, behind, theirs in other.within(start, end):
            for at in range(first, behind, _BLOCK_BYTES):
                stop = min(behind, at + _BLOCK_BYTES)
                yield at, stop, ours + at - start, theirs + at - first


def _equal(one: int, other: int, size: int, at: int = 0) -> Iterator[Range]:
    """Yields the equal parts, in whole pages, from `at` on."""
    if othermemory.is_equal(one + at, other + at, size):
        yield at, at + size
    elif size > PAGE:
        half = size // (2 * PAGE) * PAGE
        yield from _equal(one, other, half, at)
        yield from _equal(one, other, size - half, at + half)


def store(criu: Path, found: Family, space: CopiedSpace) -> None:
    """Write the content that a family shares, from the copy of its root, and the lists of pages.

    Raises ValueError if a part of the content is missing; OSError.
    """
    content = Extents(space.content)
    shared = list(found.shared[space.number])
    listed = pagemap.Pagemap(
        space.pages.pages_id,
        tuple(pagemap.Pages(start, end, pagemap.PRESENT) for start, end, _ in shared),
    )
    target = family.pages_of(criu, space.pages.pages_id)
    with space.data.open("rb") as whole, target.open("xb") as file:
        to = 0
        for start, end, _ in shared:
            for first, behind, offset in content.within(start, end):
                datafile.copy_range(
                    whole.fileno(), offset, file.fileno(), to + first - start, behind - first
                )
            to += end - start
    target.chmod(0o600)
    for pid in found.shared:
        family.write_parent(criu, pid, listed)
    for parent, child in found.pairs:
        family.align(criu, parent, child)


def _size(extents: Extents) -> int:
    return sum(end - start for start, end, _ in extents)
