"""Turns the copies of shared memory into payloads of ours.

The image that lists the pages of an object keeps only its head, so that CRIU makes the object empty
and at its full size. See `shim.memory.serve.shared` for the filling. CRIU reads small objects
itself. Blocking, after the thaw.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shim.contract.paths import RANGES_SUFFIX
from shim.criu import pagemap, sharedmem
from shim.criu.images import DamagedImage
from shim.memory.copy import datafile
from shim.memory.copy.copied import Content
from shim.memory.extents import joined

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from shim.criu.sharedmem import SharedObject
    from shim.memory.copy.copied import CopiedSpace
    from shim.memory.extents import Extent

_LEAST_BYTES = 1 << 20
"""CRIU reads smaller objects itself, in less time than a request to the page server takes."""


def settle_shared(criu: Path, copied: Iterable[CopiedSpace]) -> list[dict[str, object]]:
    """Make the payloads of the copied objects whose content CRIU lacks.

    Returns their entries in layout.json. Raises ValueError if a page is missing; DamagedImage,
    OSError.
    """
    known = sharedmem.objects(criu)
    return [found for each in copied if (found := _object(criu, each, known[each.number]))]


def _object(criu: Path, copied: CopiedSpace, known: SharedObject) -> dict[str, object] | None:
    image = criu / sharedmem.LISTS.replace("*", str(copied.number))
    listed = copied.pages.pages
    if any(each.end > known.size or not each.flags & pagemap.PRESENT for each in listed):
        raise DamagedImage(f"{image.name}: pages beyond the object's end, or of another snapshot")
    content = Content(copied)
    kept = joined(extent for each in listed for extent in content.of(each.start, each.end))
    pages = criu / f"pages-{copied.pages.pages_id}.img"
    size = sum(each.size for each in listed)
    with copied.data.open("r+b") as data, pages.open("xb") as criu_reads:
        pages.chmod(0o600)
        if size < _LEAST_BYTES:
            for offset, to, length in _places(listed, content):
                datafile.copy_range(data.fileno(), offset, criu_reads.fileno(), to, length)
            criu_reads.truncate(size)
            copied.data.unlink()
            return None
        datafile.keep_only(data.fileno(), kept)
    ranges = copied.data.with_suffix(RANGES_SUFFIX)
    datafile.write_ranges(ranges, kept)
    pagemap.write(image, pagemap.Pagemap(copied.pages.pages_id, ()))
    return {
        "image": image.name, "data": copied.data.name, "ranges": ranges.name, "size": known.size
    }  # fmt: skip


def _places(listed: Iterable[pagemap.Pages], content: Content) -> Iterable[Extent]:
    """Yields offset in the copy, place in CRIU's pages, and size: CRIU's pages lie in sequence."""
    to = 0
    for each in listed:
        for start, end, offset in content.of(each.start, each.end):
            yield offset, to + start - each.start, end - start
        to += each.size
