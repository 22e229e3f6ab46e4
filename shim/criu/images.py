"""Reads CRIU's images, and pads addresses in them so that a restore can patch the addresses.

An image is two magic words, then for each entry its length (32 bit, little endian) and protobuf
bytes. Source: CRIU, images/*.proto and criu/include/magic.h. T2: imports protobuf.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.message import DecodeError, Message

from protos import criu_pb2
from shim.criu.fixedwidth import address_words, encode_word

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

Entry = TypeVar("Entry", bound=Message)
_LENGTH = struct.Struct("<I")
_HEADER_BYTES = 8
_COMMON_MAGIC = 0x54564319
_SMALL_BYTES = 4096
_FILE_ISK, _ISK_SRC_ADDR = 4, 11


class DamagedImage(ValueError):
    """The file is not an image of CRIU, or ends in the middle of an entry."""


@dataclass(frozen=True, slots=True)
class LinkRemap:
    """A name that CRIU made for the time of the dump. Names are relative to the container's root.

    original: the name that was deleted. link: the name that the restore will look for.
    """

    original: str
    link: str


def entries(path: Path) -> Iterator[bytes]:
    """Yields the protobuf bytes of each entry. Raises DamagedImage, OSError."""
    yield from _split(path.read_bytes())


def first(path: Path) -> bytes:
    """Returns the bytes of the first entry, which must be small. Raises DamagedImage, OSError."""
    with path.open("rb") as file:
        start = file.read(_HEADER_BYTES + _LENGTH.size)
        is_whole = len(start) == _HEADER_BYTES + _LENGTH.size
        size = _LENGTH.unpack_from(start, _HEADER_BYTES)[0] if is_whole else 0
        if size > _SMALL_BYTES:
            raise DamagedImage(
                f"{path.name}: first entry of {size} bytes, {_SMALL_BYTES} is the limit"
            )
        for found in _split(start + file.read(size)):
            return found
    raise DamagedImage(f"{path.name}: empty")


def _split(data: bytes) -> Iterator[bytes]:
    if len(data) < _HEADER_BYTES or _LENGTH.unpack_from(data)[0] != _COMMON_MAGIC:
        raise DamagedImage("not an image of CRIU: wrong magic")
    at = _HEADER_BYTES
    while at < len(data):
        if at + _LENGTH.size > len(data):
            raise DamagedImage(f"cut at byte {at}")
        end = at + _LENGTH.size + _LENGTH.unpack_from(data, at)[0]
        if end > len(data):
            raise DamagedImage(f"cut at byte {at}")
        yield data[at + _LENGTH.size : end]
        at = end


def parsed(kind: type[Entry], raw: bytes, path: Path) -> Entry:
    """Returns an entry of the image at `path`. Raises DamagedImage."""
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise DamagedImage(f"{path.name}: {error}") from error


@dataclass(frozen=True, slots=True)
class Ghost:
    """A file, open or mapped, without a name: CRIU makes the file again, by its last name.

    path: its last name, absolute, in the container. mode: with the type.
    """

    path: str
    mode: int


def ghosts(directory: Path) -> list[Ghost]:
    """Returns the ghost files of a dump. Raises DamagedImage, OSError."""
    found = []
    for remap, names in _remaps(directory):
        if remap.remap_type == criu_pb2.RemapEntry.GHOST:
            image = directory / f"ghost-file-{remap.remap_id:x}.img"
            made = parsed(criu_pb2.GhostFile, first(image), image)
            found.append(Ghost(f"/{names[remap.orig_id]}", made.mode))
    return found


def link_remaps(directory: Path) -> list[LinkRemap]:
    """Returns the link remaps of a dump. Raises DamagedImage, OSError."""
    return [
        LinkRemap(names[remap.orig_id], names[remap.remap_id])
        for remap, names in _remaps(directory)
        if remap.remap_type == criu_pb2.RemapEntry.LINKED
    ]


def _remaps(directory: Path) -> Iterator[tuple[criu_pb2.RemapEntry, dict[int, str]]]:
    """Yields each remap, and the names of all files by their id."""
    remaps = directory / "remap-fpath.img"
    if not remaps.exists():
        return
    names = {}
    for entry in entries(directory / "files.img"):
        file = _file(entry)
        if file.HasField("reg"):
            names[file.reg.id] = os.fsdecode(file.reg.name).lstrip("/")
    for entry in entries(remaps):
        remap = parsed(criu_pb2.RemapEntry, entry, remaps)
        needed = {remap.orig_id}
        if remap.remap_type == criu_pb2.RemapEntry.LINKED:
            needed.add(remap.remap_id)
        if remap.remap_type != criu_pb2.RemapEntry.PROCFS and not needed <= names.keys():
            raise DamagedImage("remap-fpath.img: of a file that is not in files.img")
        yield remap, names


def socket_directories(directory: Path) -> list[str]:
    """Returns the absolute paths, in the container, of directories in which sockets are bound.

    Raises DamagedImage, OSError.
    """
    found = set()
    for entry in entries(directory / "files.img"):
        file = _file(entry)
        if file.HasField("usk") and file.usk.name.startswith(b"/"):
            found.add(os.path.dirname(os.fsdecode(file.usk.name.rstrip(b"\0"))))
    return sorted(found)


def _file(entry: bytes) -> criu_pb2.FileEntry:
    try:
        return criu_pb2.FileEntry.FromString(entry)
    except DecodeError as error:
        raise DamagedImage(f"files.img: {error}") from error


def make_patchable(directory: Path, addresses: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Give each word of a socket's source address in `addresses` a fixed width in files.img.

    Returns address and offsets in the rewritten file for each such socket, the input of
    `shim.network.readdress.readdressed`; without such a socket the file stays as it is. Protobuf
    readers accept padded varints. Raises DamagedImage, OSError.
    """
    path = directory / "files.img"
    data = path.read_bytes()
    wanted = {tuple(address_words(address)): address for address in addresses}
    wanted |= {
        (0, 0, 0xFFFF0000, *words): address for words, address in wanted.items() if len(words) == 1
    }  # IPv4 addresses of IPv6 sockets
    out, patches = bytearray(data[:_HEADER_BYTES]), []
    for entry in _split(data):
        file = _file(entry)
        address = wanted.get(tuple(file.isk.src_addr)) if file.HasField("isk") else None
        if address is None:
            out += _LENGTH.pack(len(entry)) + entry
            continue
        padded, offsets = _padded(entry)
        if len(offsets) != len(file.isk.src_addr):
            raise DamagedImage("the address of a socket is not one varint for each word")
        count = len(address_words(address))
        base = len(out) + _LENGTH.size
        patches.append((address, [base + offset for offset in offsets[-count:]]))
        out += _LENGTH.pack(len(padded)) + padded
    if patches:
        path.write_bytes(out)
    return patches


def _padded(entry: bytes) -> tuple[bytes, list[int]]:
    """Returns the file entry with the words of isk.src_addr padded, and the words' offsets."""
    out = bytearray()
    offsets: list[int] = []
    for number, start, body, end in fields(entry):
        if number != _FILE_ISK:
            out += entry[start:end]
            continue
        socket, inner = bytearray(), []
        for field, begin, value, stop in fields(entry[body:end]):
            chunk = entry[body:end][begin:stop]
            if field == _ISK_SRC_ADDR:
                word, _ = varint(entry[body:end], value)
                tag = entry[body:end][begin:value]
                inner.append(len(socket) + len(tag))
                chunk = tag + encode_word(word)
            socket += chunk
        # The length's own width depends on the new size.
        tag_end = varint(entry, start)[1]
        out += entry[start:tag_end] + _minimal(len(socket))
        offsets = [len(out) + offset for offset in inner]
        out += socket
    return bytes(out), offsets


def fields(message: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yields (field number, start of its tag, start of its value, end) for each field.

    Raises DamagedImage.
    """
    at = 0
    while at < len(message):
        start = at
        tag, at = varint(message, at)
        number, wire = tag >> 3, tag & 7
        value = at
        if wire == 0:
            _, at = varint(message, at)
        elif wire == 1:
            at += 8
        elif wire == 2:
            size, value = varint(message, at)
            at = value + size
        elif wire == 5:
            at += 4
        else:
            raise DamagedImage(f"wire type {wire}")
        if at > len(message):
            raise DamagedImage("a field ends behind its message")
        yield number, start, value, at


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Returns the number at `at`, and the offset behind it. Raises DamagedImage."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise DamagedImage("a varint ends behind its message")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise DamagedImage("a varint is too long")


def _minimal(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
