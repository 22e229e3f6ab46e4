"""Makes CRIU's images for a restore: a view with the new pod's name and addresses.

A socket that was bound to the captured pod's address must be bound to the new pod's. The capture
gave every word of such an address in files.img a fixed width (see shim.criu.images), so that this
module can overwrite the word in place.
"""

from __future__ import annotations

import os
import struct

from shim.criu.fixedwidth import WORD_BYTES, address_words, encode_word

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from shim.oci.spec import Spec

PATCHED = "files.img"
UTS_PREFIX = "utsns-"
_EARLIER = "parent"
"""CRIU's name for the directory with the images of an earlier dump."""
_HEADER_BYTES, _ENTRY_AT = 8, 12
_NODENAME_TAG = 0x0A
_HOSTNAME_BYTES = 64


def patches_of(network: Mapping[str, Any]) -> list[tuple[str, list[int]]]:
    """Returns the manifest's patches: for each socket the address and the offsets of its words.

    Raises ValueError if they are malformed.
    """
    listed = network.get("patches") or []
    if not isinstance(listed, list):
        raise ValueError("the manifest's patches are no list")
    return [_patch(patch) for patch in listed]


def _patch(patch: object) -> tuple[str, list[int]]:
    address = patch.get("address") if isinstance(patch, dict) else None
    offsets = patch.get("offsets") if isinstance(patch, dict) else None
    if not isinstance(address, str) or not isinstance(offsets, list):
        raise ValueError(f"not a patch: {patch!r:.80}")
    if not all(type(offset) is int and offset >= 0 for offset in offsets):
        raise ValueError(f"a patch with odd offsets: {offsets!r:.80}")
    return address, offsets


def replacements(captured: Sequence[str], present: Sequence[str]) -> dict[str, str]:
    """Returns for each captured address the new pod's first address of the same family, if any."""
    chosen = {}
    for address in captured:
        same = [new for new in present if (":" in new) == (":" in address)]
        if same:
            chosen[address] = same[0]
    return chosen


def in_images(
    images: dict[str, bytes], network: Mapping[str, Any], present: Sequence[str]
) -> list[str]:
    """Give sockets in `images` addresses that are `present` in the pod. Raises ValueError.

    network: of the manifest. Returns the captured addresses without a counterpart, sorted.
    """
    patches = patches_of(network)
    captured = [address for address, _ in patches]
    chosen = replacements(captured, present)
    if patches:
        images[PATCHED] = readdressed(images[PATCHED], patches, chosen)
    return sorted(set(captured) - chosen.keys())


def readdressed(
    data: bytes, patches: Sequence[tuple[str, list[int]]], chosen: Mapping[str, str]
) -> bytes:
    """Returns files.img with other addresses. patches: of `patches_of`, chosen: of `replacements`.

    Raises ValueError for an offset that is not in the file.
    """
    changed = bytearray(data)
    for address, offsets in patches:
        if address in chosen:
            for offset, word in zip(offsets, address_words(chosen[address]), strict=True):
                if offset + WORD_BYTES > len(data):
                    raise ValueError(f"a patch at {offset} of {len(data)} bytes")
                changed[offset : offset + WORD_BYTES] = encode_word(word)
    return bytes(changed)


def renamed(data: bytes, hostname: str) -> bytes:
    """Returns utsns-N.img with another host name. Raises ValueError.

    The restored processes join the sandbox's namespace, and still CRIU sets that namespace's name
    to the captured name. The image has a single entry whose first field is the name. Source: CRIU,
    images/utsns.proto.
    """
    tag, size = data[_ENTRY_AT : _ENTRY_AT + 2]
    raw = hostname.encode()
    if tag != _NODENAME_TAG or size > _HOSTNAME_BYTES or len(raw) > _HOSTNAME_BYTES:
        raise ValueError("the image of the UTS namespace has no host name of a host's length")
    entry = bytes([_NODENAME_TAG, len(raw)]) + raw + data[_ENTRY_AT + 2 + size :]
    return data[:_HEADER_BYTES] + struct.pack("<I", len(entry)) + entry


def with_name_of(spec: Spec, captured: Mapping[str, bytes]) -> dict[str, bytes]:
    """Returns the images of the UTS namespace with the sandbox's name. Raises OSError."""
    from shim.kernel.utsns import hostname_in

    uts = spec.namespace("uts")
    name = hostname_in(uts) if uts else spec.hostname
    return {
        image: renamed(data, name)
        for image, data in captured.items()
        if name and image.startswith(UTS_PREFIX)
    }


def view_of(
    images: str,
    view: str,
    linked: Sequence[str],
    written: Mapping[str, bytes],
    piped: Sequence[str] = (),
) -> None:
    """Make directory `view`: links to the files of `images` that are `linked`, and new files.

    written: the content of the new files. piped: the names in `written` that become fifos (see
    `shim.memory.serve.shared`). The view has a file, not a link, for all that CRIU parses, with
    bytes that were checked: nobody can change them between the check and CRIU. The links are
    relative: CRIU opens some images beneath a descriptor of `view` after it has changed its root,
    where an absolute link would lead into the container. Raises OSError.
    """
    os.makedirs(view, 0o700, exist_ok=True)
    if has_earlier([*linked, *written]):
        os.mkdir(f"{view}/{_EARLIER}", 0o700)
    for name in linked:
        path = _place(view, name)
        target = os.path.relpath(os.path.realpath(images), os.path.realpath(os.path.dirname(path)))
        os.symlink(f"{target}/{name}", path)
    for name in piped:
        os.mkfifo(f"{view}/{name}", 0o600)
    for name, data in written.items():
        if name in piped:
            continue
        with open(_place(view, name), "wb") as file:
            file.write(data)


def has_earlier(names: Iterable[str]) -> bool:
    """Returns whether `names` has images of an earlier dump: see `shim.criu.family`."""
    return any(name.startswith(f"{_EARLIER}-") for name in names)


def _place(view: str, name: str) -> str:
    if name.startswith(f"{_EARLIER}-"):
        return f"{view}/{_EARLIER}/{name.removeprefix(f'{_EARLIER}-')}"
    return f"{view}/{name}"
