"""CRIU's images for one restore: the snapshot's own, or a view of them with other addresses.

A socket that was bound to the captured pod's address must be bound to the new pod's. At capture
every word of such an address in files.img was given a fixed width (see shim.capture.addresses),
so that here it can be overwritten in place.
"""

from __future__ import annotations

import os

from shim.criu.addresses import WORD_BYTES, address_words, encode_word

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

PATCHED = "files.img"


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

    The links are relative: CRIU opens some images beneath a descriptor of `view` when it has
    changed its root, where an absolute link would lead into the container.

    patches: as of `patches_of`. chosen: as of `replacements`. Returns `view`. Raises OSError.
    """
    os.mkdir(view, 0o700)
    target = os.path.relpath(os.path.realpath(images), os.path.realpath(view))
    for name in os.listdir(images):
        if name != PATCHED:
            os.symlink(f"{target}/{name}", f"{view}/{name}")
    with open(f"{images}/{PATCHED}", "rb") as file:
        data = bytearray(file.read())
    for address, offsets in patches:
        if address in chosen:
            for offset, word in zip(offsets, address_words(chosen[address]), strict=True):
                data[offset : offset + WORD_BYTES] = encode_word(word)
    with open(f"{view}/{PATCHED}", "wb") as file:
        file.write(data)
    return view
