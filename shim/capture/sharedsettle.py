"""The content of shared memory, as CRIU has dumped it, becomes a payload of ours.

pages-N.img of an object becomes its file of data by a rename, without the pages that are zeros; the
image that lists its pages keeps its head, so that CRIU makes the object at its full size and empty.
See `shim.memory.shared` for who fills it. Blocking, after the thaw.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from shim.capture import datafile
from shim.criu import pagemap, sharedmem
from shim.criu.images import DamagedImage
from shim.memory import layout

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from shim.criu.sharedmem import SharedObject
    from shim.memory.extents import Extent

_PREFIX, _SUFFIX = "pagemap-shmem-", ".img"
_LEAST_BYTES = 1 << 20
"""What is smaller CRIU reads itself, in less time than it takes to be asked."""
_BLOCK_BYTES = 1 << 20
_ZEROS = bytes(pagemap.PAGE)


def settle_shared(criu: Path, memory: Path) -> list[dict[str, object]]:
    """Make the payloads in `memory` of what was dumped in `criu`.

    Returns what layout.json has of them. Pages of hugetlb stay CRIU's: they are not filled by the
    page. Raises DamagedImage, OSError.
    """
    found = sharedmem.objects(criu)
    return [
        shared
        for path in sorted(criu.glob(f"{_PREFIX}*{_SUFFIX}"))
        if (each := found.get(int(path.name[len(_PREFIX) : -len(_SUFFIX)]))) and not each.is_huge
        if (shared := _object(criu, memory, path, each))
    ]


def _object(
    criu: Path, memory: Path, image: Path, found: SharedObject
) -> dict[str, object] | None:  # fmt: skip
    pages = pagemap.read(image)
    if sum(each.size for each in pages.pages) < _LEAST_BYTES:
        return None
    if any(each.end > found.size for each in pages.pages):
        raise DamagedImage(f"{image.name}: pages beyond the object's end")
    data = f"shared-{found.shmid}{layout.DATA_SUFFIX}"
    ranges = f"shared-{found.shmid}.ranges"
    dumped = criu / f"pages-{pages.pages_id}{_SUFFIX}"
    dumped.rename(memory / data)
    os.close(os.open(dumped, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    with (memory / data).open("r+b") as file:
        kept = _without_zeros(file.fileno(), _listed(pages.pages))
    datafile.write_ranges(memory / ranges, kept)
    pagemap.write(image, pagemap.Pagemap(pages.pages_id, ()))
    return {"image": image.name, "data": data, "ranges": ranges, "size": found.size}


def _listed(pages: Iterable[pagemap.Pages]) -> list[Extent]:
    """Where in pages-N.img the content of which part of the object is."""
    extents: list[Extent] = []
    offset = 0
    for each in pages:
        if not each.flags & pagemap.PRESENT:
            raise DamagedImage("shared memory without the content of its pages")
        extents.append((each.start, each.end, offset))
        offset += each.size
    return extents


def _without_zeros(fd: int, extents: Iterable[Extent]) -> list[Extent]:
    """The extents without the pages that are zeros, whose place in the file becomes a hole."""
    kept: list[Extent] = []
    for start, end, offset in extents:
        for first, size in _content(fd, offset, end - start):
            at = start + first - offset
            if kept and kept[-1][1] == at and kept[-1][2] + at - kept[-1][0] == first:
                kept[-1] = (kept[-1][0], at + size, kept[-1][2])
            else:
                kept.append((at, at + size, first))
    datafile.keep_only(fd, kept)
    return kept


def _content(fd: int, offset: int, size: int) -> list[tuple[int, int]]:
    """Where there is anything else than zeros: offset and size, whole pages."""
    found: list[tuple[int, int]] = []
    for at in range(offset, offset + size, _BLOCK_BYTES):
        block = os.pread(fd, min(_BLOCK_BYTES, offset + size - at), at)
        if len(block) < min(_BLOCK_BYTES, offset + size - at):
            raise DamagedImage("pages-N.img ends before its pages do")
        for page in range(0, len(block), pagemap.PAGE):
            if block[page : page + pagemap.PAGE] == _ZEROS:
                continue
            if found and sum(found[-1]) == at + page:
                found[-1] = (found[-1][0], found[-1][1] + pagemap.PAGE)
            else:
                found.append((at + page, pagemap.PAGE))
    return found
