"""files.img with addresses that can be overwritten in place is still the same image."""

from __future__ import annotations

import socket
import struct
import tempfile
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import criu_pb2
from shim.criu import images
from shim.criu.fixedwidth import WORD_BYTES, address_words, encode_word
from shim.network.readdress import readdressed

if TYPE_CHECKING:
    from collections.abc import Sequence

MAGIC = struct.pack("<II", 0x54564319, 0x56303138)
CAPTURED = "10.88.0.2", "fd00:88::2"
NEW = {"10.88.0.2": "255.254.253.252", "fd00:88::2": "fd00:99:ffff::7"}

words = st.integers(0, 0xFFFFFFFF)
varints = st.integers(0, 2**64 - 1)


def mapped(address: str) -> list[int]:
    """Returns the words of an IPv4 address that an IPv6 socket is bound to."""
    raw = socket.inet_pton(socket.AF_INET6, f"::ffff:{address}")
    return list(struct.unpack("<4I", raw))


known = st.sampled_from(
    [address_words(CAPTURED[0]), address_words(CAPTURED[1]), mapped(CAPTURED[0])]
)
sources = known | st.lists(words, min_size=4, max_size=4) | st.lists(words, min_size=1, max_size=1)


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | bytes) -> bytes:
    """Encodes as CRIU does: repeated words one by one (proto2), not packed."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


@st.composite
def sockets(draw: st.DrawFn) -> bytes:
    """Draws an entry with an InetSocket, with fields that our .proto does not know between
    others.
    """
    inner = field(1, draw(words)) + field(3, draw(st.sampled_from([2, 10]))) + field(7, 8000)
    inner += field(9, draw(varints))
    inner += b"".join(field(11, word) for word in draw(sources))
    inner += b"".join(field(12, word) for word in draw(st.lists(words, max_size=4)))
    inner += field(14, draw(st.binary(max_size=200)))
    return field(1, 4) + field(2, draw(words)) + field(4, inner) + field(99, draw(varints))


@st.composite
def regular(draw: st.DrawFn) -> bytes:
    name = draw(st.binary(max_size=30))
    return field(1, 1) + field(2, draw(words)) + field(3, field(1, draw(words)) + field(6, name))


entry_lists = st.lists(sockets() | regular(), max_size=6)


def image(entries: Sequence[bytes]) -> bytes:
    return MAGIC + b"".join(struct.pack("<I", len(entry)) + entry for entry in entries)


def patched(data: bytes) -> tuple[bytes, list[tuple[str, list[int]]]]:
    """Returns files.img and the patches that `make_patchable` makes of `data`."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "files.img"
        path.write_bytes(data)
        patches = images.make_patchable(Path(directory), CAPTURED)
        return path.read_bytes(), patches


def parsed(data: bytes) -> list[criu_pb2.FileEntry]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "files.img"
        path.write_bytes(data)
        return [criu_pb2.FileEntry.FromString(entry) for entry in images.entries(path)]


def address_of(entry: criu_pb2.FileEntry) -> str:
    """Returns the address that the entry's socket is bound to; an IPv4 address as such. Empty: no
    socket.
    """
    raw = struct.pack(f"<{len(entry.isk.src_addr)}I", *entry.isk.src_addr)
    if len(raw) == 4:
        return str(IPv4Address(raw))
    if len(raw) == 16:
        address = IPv6Address(raw)
        return str(address.ipv4_mapped or address)
    return ""


@given(entry_lists)
def test_patchable_image_has_the_same_content(entries: list[bytes]) -> None:
    data = image(entries)
    assert parsed(patched(data)[0]) == parsed(data)


@given(entry_lists)
def test_offsets_point_at_the_words_of_the_address(entries: list[bytes]) -> None:
    data, patches = patched(image(entries))
    for address, offsets in patches:
        for offset, word in zip(offsets, address_words(address), strict=True):
            assert data[offset : offset + WORD_BYTES] == encode_word(word)


@given(entry_lists)
def test_readdressed_sockets_have_the_new_address_and_all_else_is_kept(
    entries: list[bytes],
) -> None:
    data, patches = patched(image(entries))
    before, after = parsed(data), parsed(readdressed(data, patches, NEW))
    assert [address for address, _ in patches] == [
        address_of(entry) for entry in before if address_of(entry) in NEW
    ]
    for old, new in zip(before, after, strict=True):
        assert address_of(new) == NEW.get(address_of(old), address_of(old))
        new.isk.ClearField("src_addr")
        old.isk.ClearField("src_addr")
        assert new == old


def test_an_image_without_such_a_socket_is_not_written() -> None:
    data = image([field(1, 1) + field(2, 7)])
    assert patched(data) == (data, [])


@given(entry_lists, st.data())
def test_damaged_image_is_reported_as_damaged(entries: list[bytes], data: st.DataObject) -> None:
    damaged = bytearray(image(entries))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)), label="cut")]
    for _ in range(data.draw(st.integers(0, 4), label="flips")):
        if damaged:
            at = data.draw(st.integers(0, len(damaged) - 1))
            damaged[at] = data.draw(st.integers(0, 255))
    try:
        patched(bytes(damaged))
    except images.DamagedImage:
        return


@given(st.binary(max_size=200))
def test_garbage_is_a_damaged_image(garbage: bytes) -> None:
    try:
        patched(MAGIC + garbage)
    except images.DamagedImage:
        return


@given(st.lists(st.binary(max_size=40), max_size=3), st.data())
def test_first_entry_is_read_alone(entries: list[bytes], data: st.DataObject) -> None:
    whole = MAGIC + b"".join(struct.pack("<I", len(each)) + each for each in entries)
    cut = whole[: data.draw(st.integers(0, len(whole)), label="cut")]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "pagemap-1.img"
        path.write_bytes(cut)
        if entries and len(cut) >= len(MAGIC) + 4 + len(entries[0]):
            assert images.first(path) == entries[0]
        else:
            with pytest.raises(images.DamagedImage):
                images.first(path)


def test_first_entry_that_claims_a_large_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "pagemap-1.img"
    path.write_bytes(MAGIC + struct.pack("<I", 1 << 30))
    with pytest.raises(images.DamagedImage, match="is the limit"):
        images.first(path)


def test_file_without_image_magic_is_refused() -> None:
    with pytest.raises(images.DamagedImage):
        patched(b"not an image of CRIU's")


def test_link_remaps_name_files_that_are_not_utf8(tmp_path: Path) -> None:
    files = [
        field(1, 1) + field(2, number) + field(3, field(1, number) + field(6, name))
        for number, name in ((1, b"/dev/shm/\xff (deleted)"), (2, b"/dev/shm/link_remap.1"))
    ]
    (tmp_path / "files.img").write_bytes(image(files))
    (tmp_path / "remap-fpath.img").write_bytes(
        image([field(1, 1) + field(2, 2) + field(3, 0), field(1, 1) + field(2, 2) + field(3, 1)])
    )
    assert images.link_remaps(tmp_path) == [
        images.LinkRemap("dev/shm/\udcff (deleted)", "dev/shm/link_remap.1")
    ]


def test_ghost_files_have_their_path_and_mode(tmp_path: Path) -> None:
    file = field(1, 1) + field(2, 1) + field(3, field(1, 1) + field(6, b"dev/shm/d/gone"))
    (tmp_path / "files.img").write_bytes(image([file]))
    (tmp_path / "remap-fpath.img").write_bytes(image([field(1, 1) + field(2, 26) + field(3, 1)]))
    (tmp_path / "ghost-file-1a.img").write_bytes(
        image([field(1, 5) + field(2, 6) + field(3, 0o104600)]) + b"the content"
    )
    assert images.ghosts(tmp_path) == [images.Ghost("/dev/shm/d/gone", 0o104600)]


def test_remap_of_an_unknown_file_is_damage(tmp_path: Path) -> None:
    (tmp_path / "files.img").write_bytes(image([]))
    (tmp_path / "remap-fpath.img").write_bytes(image([field(1, 1) + field(2, 2) + field(3, 0)]))
    with pytest.raises(images.DamagedImage):
        images.link_remaps(tmp_path)
