"""Reads and writes the layout of a snapshot's memory: each range of a process, and its content.

`memory/layout.json`, and for each address space a file of ranges and a file of data:

    {"schema": 1, "spaces": [
        {"pid": 1, "data": "space-1.data", "ranges": "space-1.ranges", "areas": [[start, end], …],
         "huge": [[start, end], …]}],
     "shared": [
        {"image": "pagemap-shmem-7.img", "data": "shared-7.data", "ranges": "shared-7.ranges",
         "size": …}]}

pid: as in CRIU's images. areas: the areas that CRIU registers with the page server. huge: the areas
in which the process wanted huge pages. Shared memory is listed by object, not by process: addresses
of its ranges are offsets in the object, which has `size` bytes, and image is the name by which CRIU
asks for the object's content.

A file of ranges is 8 bytes of magic and then for each range three 64 bit little endian numbers:
address, length and offset in the file of data; in the order of addresses, disjoint, whole pages. A
page of an area or object in no range reads as zeros. `shim.memory.copy.settle` writes all of these
files; a restore parses them from memory after it has checked their digests. A reader ignores
unknown keys: earlier captures also wrote `compression` (always none) and `sampled_ratio`. Lean.
"""

from __future__ import annotations

import struct

from shim.contract import jsontext
from shim.contract.paths import MEMORY_LAYOUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from shim.memory.extents import Extent

SCHEMA = 1
MAGIC = b"qtranges"
_SHARED_IMAGE = "pagemap-shmem-"
_RANGE = struct.Struct("<QQQ")
_PAGE = 4096
_TOP = 1 << 56


class BadLayout(ValueError):
    """The layout is not as a capture writes it."""


class SpaceLayout:
    """The layout of an address space. pid: in the container. data: name of its file."""

    __slots__ = ("areas", "data", "extents", "huge", "pid")

    def __init__(
        self,
        pid: int,
        data: str,
        extents: list[Extent],
        areas: list[tuple[int, int]],
        huge: list[tuple[int, int]],
    ) -> None:
        self.pid, self.data, self.extents, self.areas, self.huge = pid, data, extents, areas, huge


class SharedLayout:
    """The layout of a shared object of `size` bytes. image: CRIU's. data: name of its file."""

    __slots__ = ("data", "extents", "image", "size")

    def __init__(self, image: str, data: str, extents: list[Extent], size: int) -> None:
        self.image, self.data, self.extents, self.size = image, data, extents, size


class Layout:
    """The layout of all memory of a snapshot."""

    __slots__ = ("shared", "spaces")

    def __init__(self, spaces: list[SpaceLayout], shared: list[SharedLayout]) -> None:
        self.spaces, self.shared = spaces, shared


def encode_ranges(extents: Iterable[Extent]) -> bytes:
    """Returns the content of a file of ranges."""
    return MAGIC + b"".join(
        _RANGE.pack(start, end - start, offset) for start, end, offset in extents
    )


def decode_ranges(data: bytes) -> list[Extent]:
    """Returns the extents of a file of ranges. Raises BadLayout."""
    if data[: len(MAGIC)] != MAGIC or (len(data) - len(MAGIC)) % _RANGE.size:
        raise BadLayout("not a file of ranges: wrong magic, or not a whole number of ranges")
    found: list[Extent] = []
    behind = 0
    for start, size, offset in _RANGE.iter_unpack(data[len(MAGIC) :]):
        if start < behind or not size or (start | size | offset) % _PAGE or start + size > _TOP:
            raise BadLayout(f"a range at {start:#x} of {size} bytes is out of order")
        behind = start + size
        found.append((start, behind, offset))
    return found


def encode(spaces: Sequence[Mapping[str, object]], shared: Sequence[Mapping[str, object]]) -> bytes:
    """Returns the content of layout.json. The module's docstring has the keys of both."""
    found = {"schema": SCHEMA, "spaces": list(spaces), "shared": list(shared)}
    return jsontext.compose(found).encode() + b"\n"


def decode(files: Mapping[str, bytes], sizes: Mapping[str, int]) -> Layout:
    """Returns the layout. files: the small files of `memory/`. sizes: of its data files. By name.

    Raises BadLayout.
    """
    try:
        found = jsontext.parse(files[MEMORY_LAYOUT])
        if not isinstance(found, dict) or found.get("schema") != SCHEMA:
            raise BadLayout("no schema that this quickthaw reads")
        spaces = [_space(each, files, sizes) for each in found["spaces"]]
        return Layout(spaces, [_shared(each, files, sizes) for each in found["shared"]])
    except (KeyError, TypeError) as error:
        raise BadLayout(f"the layout of the memory is incomplete: {error}") from error


def _space(found: object, files: Mapping[str, bytes], sizes: Mapping[str, int]) -> SpaceLayout:
    if not isinstance(found, dict) or type(found["pid"]) is not int:
        raise BadLayout("a space of the layout has no whole number as pid")
    extents = _extents(found, files, sizes)
    areas, huge = _areas(found["areas"]), _areas(found["huge"])
    return SpaceLayout(found["pid"], found["data"], extents, areas, huge)


def _areas(found: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    areas = [(start, end) for start, end in found]
    if not all(type(start) is int and type(end) is int for start, end in areas):
        raise BadLayout("an area of the layout has addresses that are not whole numbers")
    return areas


def _shared(found: object, files: Mapping[str, bytes], sizes: Mapping[str, int]) -> SharedLayout:
    if not isinstance(found, dict) or type(found["size"]) is not int:
        raise BadLayout("a shared object of the layout has no whole number as size")
    image, extents = found["image"], _extents(found, files, sizes)
    if not isinstance(image, str) or "/" in image or not image.startswith(_SHARED_IMAGE):
        raise BadLayout(f"not an image of shared memory: {image!r:.80}")
    if extents and extents[-1][1] > found["size"]:
        raise BadLayout(f"{image}: a range beyond the object's end")
    return SharedLayout(image, found["data"], extents, found["size"])


def _extents(
    found: Mapping[str, str], files: Mapping[str, bytes], sizes: Mapping[str, int]
) -> list[Extent]:
    extents = decode_ranges(files[found["ranges"]])
    if any(offset + end - start > sizes[found["data"]] for start, end, offset in extents):
        raise BadLayout(f"{found['data']} is too short for its ranges")
    return extents
