"""Turns what CRIU has dumped into what a page server restores: `memory/` beside `criu/`.

CRIU's pages-N.img of a process becomes the payload by a rename; the pages that CRIU reads itself
(what is not lazy: stacks, files that are mapped privately and were changed) go to a small new one,
and pagemap-PID.img says which is where. See `shim.memory.layout`. Blocking, after the thaw.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from shim.contract.paths import SNAPSHOT_CRIU, SNAPSHOT_MEMORY
from shim.criu import pagemap
from shim.criu.images import DamagedImage
from shim.kernel.filesystem import punch_hole
from shim.memory import layout

if TYPE_CHECKING:
    from pathlib import Path

    from shim.criu.pagemap import Pages
    from shim.memory.extents import Extent

_PREFIX, _SHARED_PREFIX, _SUFFIX = "pagemap-", "pagemap-shmem-", ".img"
_COPY_BYTES = 64 << 20


def settle(staging: Path) -> None:
    """Make `memory/` of the dump in `criu/`. Raises DamagedImage, OSError."""
    criu, memory = staging / SNAPSHOT_CRIU, staging / SNAPSHOT_MEMORY
    memory.mkdir(mode=0o700)
    spaces = [
        _space(criu, memory, int(path.name[len(_PREFIX) : -len(_SUFFIX)]))
        for path in sorted(criu.glob(f"{_PREFIX}*{_SUFFIX}"))
        if not path.name.startswith(_SHARED_PREFIX)
    ]
    (memory / layout.LAYOUT).write_bytes(layout.encode(spaces, []))


def _space(criu: Path, memory: Path, pid: int) -> dict[str, object]:
    image = criu / f"{_PREFIX}{pid}{_SUFFIX}"
    found = pagemap.read(image)
    areas = pagemap.lazy_areas(criu / f"mm-{pid}{_SUFFIX}")
    pages = criu / f"pages-{found.pages_id}{_SUFFIX}"
    data, ranges = f"space-{pid}{layout.DATA_SUFFIX}", f"space-{pid}.ranges"
    pages.rename(memory / data)
    lazy, own = _split(found.pages, areas)
    with (memory / data).open("r+b") as whole, pages.open("xb") as small:
        for _, start, size in own:
            _copy(whole.fileno(), start, small.fileno(), size)
            punch_hole(whole.fileno(), start, size)
    pages.chmod(0o600)
    (memory / ranges).write_bytes(layout.encode_ranges(lazy))
    pagemap.write(image, pagemap.Pagemap(found.pages_id, tuple(map(_without_lazy, found.pages))))
    return {"pid": pid, "data": data, "ranges": ranges, "areas": areas}


def _split(
    pages: tuple[Pages, ...], areas: list[tuple[int, int]]
) -> tuple[list[Extent], list[tuple[int, int, int]]]:
    """What a page server fills, and what CRIU reads: address, offset in pages-N.img, size."""
    lazy: list[Extent] = []
    own: list[tuple[int, int, int]] = []
    offset = 0
    for each in pagemap.clipped(pages, areas):
        if not each.flags & pagemap.PRESENT:
            raise DamagedImage("a dump without the content of its pages")
        if each.flags & pagemap.LAZY:
            lazy.append((each.start, each.end, offset))
        else:
            own.append((each.start, offset, each.size))
        offset += each.size
    return lazy, own


def _without_lazy(pages: Pages) -> Pages:
    if not pages.flags & pagemap.LAZY:
        return pages
    return pagemap.Pages(pages.start, pages.end, pages.flags & ~pagemap.PRESENT)


def _copy(source: int, offset: int, target: int, size: int) -> None:
    while size:
        done = os.copy_file_range(source, target, min(size, _COPY_BYTES), offset_src=offset)
        if not done:
            raise DamagedImage("pages-N.img ends before its pages do")
        offset, size = offset + done, size - done
