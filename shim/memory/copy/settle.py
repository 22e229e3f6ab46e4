"""Turns a dump into a form for the page server: `memory/` beside `criu/`.

The pages that CRIU reads itself (not lazy: stacks, changed pages of private file mappings) go from
the copy of the memory to CRIU's pages-N.img, the other pages stay in the copy, and pagemap-PID.img
says which is which. CRIU also reads pages that forked processes share: see
`shim.memory.copy.forked`. See `shim.memory.layout`. Blocking, after the thaw.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from shim.contract.paths import MEMORY_LAYOUT, RANGES_SUFFIX, SNAPSHOT_CRIU, SNAPSHOT_MEMORY
from shim.criu import advice, masks, pagemap
from shim.kernel.replace import take_away
from shim.memory import layout
from shim.memory.copy import datafile
from shim.memory.copy.copied import Content
from shim.memory.copy.forked import families, store
from shim.memory.copy.memorycopy import without
from shim.memory.copy.sharedsettle import settle_shared
from shim.memory.extents import Extents, joined

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from shim.criu.pagemap import Pages
    from shim.memory.copy.copied import CopiedMemory, CopiedSpace
    from shim.memory.extents import Extent


def settle(staging: Path, copied: CopiedMemory) -> None:
    """Complete `memory/`, and fit CRIU's images to it.

    copied: of all processes that were dumped. Raises ValueError if a page is missing; DamagedImage,
    OSError.
    """
    criu, memory = staging / SNAPSHOT_CRIU, staging / SNAPSHOT_MEMORY
    by_pid = {each.number: _without_wiped(criu, each) for each in copied.spaces}
    shared: dict[int, Extents] = {}
    for each in families(criu, by_pid):
        store(criu, each, by_pid[each.root])
        shared |= each.shared
    found = [_space(criu, memory, each, shared.get(each.number)) for each in by_pid.values()]
    objects = settle_shared(criu, copied.shared)
    masks.mount_bare(criu)
    masks.own_null(criu)
    datafile.write_small(memory / MEMORY_LAYOUT, layout.encode(found, objects))


def _without_wiped(criu: Path, copied: CopiedSpace) -> CopiedSpace:
    """Returns the copy without memory that must not come along. See `shim.criu.advice`."""
    image = criu / f"mm-{copied.number}.img"
    advice.complete(image, copied.areas)
    wiped = advice.wiped(image)
    pages = (
        pagemap.Pages(start, end, each.flags)
        for each in copied.pages.pages
        for start, end in without([(each.start, each.end)], wiped)
    )
    return replace(copied, pages=pagemap.Pagemap(copied.pages.pages_id, tuple(pages)))


def _space(
    criu: Path, memory: Path, copied: CopiedSpace, shared: Extents | None
) -> dict[str, object]:
    areas = pagemap.lazy_areas(criu / f"mm-{copied.number}.img")
    listed = _without_shared(copied.pages.pages, shared) if shared else copied.pages.pages
    lazy, own, size = _split(copied, listed, areas)
    pages = criu / f"pages-{copied.pages.pages_id}.img"
    take_away(str(pages))
    with copied.data.open("r+b") as whole, pages.open("xb") as small:
        for _, offset, to, length in own:
            datafile.copy_range(whole.fileno(), offset, small.fileno(), to, length)
        small.truncate(size)
        datafile.keep_only(whole.fileno(), lazy)
    pages.chmod(0o600)
    ranges = f"space-{copied.number}{RANGES_SUFFIX}"
    datafile.write_ranges(memory / ranges, joined(lazy))  # CRIU lists a MiB at most at a time
    image = criu / f"pagemap-{copied.number}.img"
    left = _joined(map(_without_lazy, listed))
    pagemap.write(image, pagemap.Pagemap(copied.pages.pages_id, tuple(left)))
    return {
        "pid": copied.number, "data": copied.data.name, "ranges": ranges, "areas": areas,
        "huge": pagemap.huge_areas(criu / f"mm-{copied.number}.img"),
    }  # fmt: skip


def _without_shared(pages: Sequence[Pages], shared: Extents) -> tuple[Pages, ...]:
    """Returns the same pages; the shared pages are in the images of the family."""
    found = []
    for each in pages:
        at = each.start
        for start, end, _ in [*shared.within(each.start, each.end), (each.end, each.end, 0)]:
            if at < start:
                found.append(pagemap.Pages(at, start, each.flags))
            if start < end:
                found.append(pagemap.Pages(start, end, pagemap.PARENT))
            at = end
    return tuple(found)


def _split(
    copied: CopiedSpace, listed: Sequence[Pages], areas: Sequence[tuple[int, int]]
) -> tuple[list[Extent], list[tuple[int, int, int, int]], int]:
    """Returns ranges for the page server; ranges for CRIU; and the size of pages-N.img.

    A range for CRIU: address, offset, place in pages-N.img, size. Raises ValueError if a page that
    CRIU lists is missing.
    """
    content = Content(copied)
    lazy: list[Extent] = []
    own: list[tuple[int, int, int, int]] = []
    size = 0
    for each in pagemap.clipped(listed, areas):
        there = content.of(each.start, each.end)
        if each.flags & pagemap.LAZY:
            lazy += there
        elif each.flags & pagemap.PRESENT:
            own += [(start, at, size + start - each.start, end - start) for start, end, at in there]
            size += each.size
    return lazy, own, size


def _without_lazy(pages: Pages) -> Pages:
    if not pages.flags & pagemap.LAZY:
        return pages
    return pagemap.Pages(pages.start, pages.end, pages.flags & ~pagemap.PRESENT)


def _joined(pages: Iterable[Pages]) -> list[Pages]:
    """Returns the pages, with like neighbours joined: each restore goes through the list."""
    found: list[Pages] = []
    for each in pages:
        if found and (found[-1].end, found[-1].flags) == (each.start, each.flags):
            found[-1] = pagemap.Pages(found[-1].start, each.end, each.flags)
        else:
            found.append(each)
    return found
