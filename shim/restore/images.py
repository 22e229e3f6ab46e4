"""CRIU's images for one restore: the snapshot's own, or a view of them with other addresses.

A socket that was bound to the captured pod's address must be bound to the new pod's. At capture
every word of such an address in files.img was given a fixed width (see shim.capture.addresses),
so that here it can be overwritten in place.
"""

from __future__ import annotations

import os
import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

PATCHED = "files.img"
WORD_BYTES = 5
"""Width of one 32-bit word: the longest varint that it can need."""


def encode_word(word: int) -> bytes:
    """`word` as a varint of WORD_BYTES, padded with zero groups. Source: protobuf encoding."""
    groups = [(word >> 7 * index) & 0x7F for index in range(WORD_BYTES)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


def address_words(address: str) -> list[int]:
    """The words that CRIU stores for `address`: the raw bytes, loaded in host order."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    raw = socket.inet_pton(family, address)
    return [int.from_bytes(raw[at : at + 4], "little") for at in range(0, len(raw), 4)]


def patches_of(network: Mapping[str, Any]) -> list[tuple[str, list[int]]]:
    """The manifest's patches: for each socket its address and the offsets of that one's words.

    Raises ValueError or KeyError when they are malformed.
    """
    return [
        (str(patch["address"]), [int(offset) for offset in patch["offsets"]])
        for patch in network.get("patches") or ()
    ]


def replacements(captured: Sequence[str], present: Sequence[str]) -> dict[str, str]:
    """For each captured address the new pod's first one of the same family, where there is one."""
    chosen = {}
    for address in captured:
        same = [new for new in present if (":" in new) == (":" in address)]
        if same:
            chosen[address] = same[0]
    return chosen


def readdressed(
    images: str, view: str, patches: Sequence[tuple[str, list[int]]], chosen: Mapping[str, str]
) -> str:
    """Make directory `view`: links to the files of `images`, and files.img with new addresses.

    patches: as of `patches_of`. chosen: as of `replacements`. Returns `view`. Raises OSError.
    """
    os.mkdir(view, 0o700)
    for name in os.listdir(images):
        if name != PATCHED:
            os.symlink(f"{images}/{name}", f"{view}/{name}")
    with open(f"{images}/{PATCHED}", "rb") as file:
        data = bytearray(file.read())
    for address, offsets in patches:
        if address in chosen:
            for offset, word in zip(offsets, address_words(chosen[address]), strict=True):
                data[offset : offset + WORD_BYTES] = encode_word(word)
    with open(f"{view}/{PATCHED}", "wb") as file:
        file.write(data)
    return view
