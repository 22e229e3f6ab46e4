"""Reads the entries of files.img, field by field, of every kind: so that no entry is missed.

A message of protobuf would hide the fields that it does not know. Source: CRIU, images/fdinfo.proto
and the images that it names.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shim.criu import images
from shim.criu.images import DamagedImage

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    Value = int | bytes
    Body = Mapping[int, list[Value]]

_REGULAR, _NAME, _FLAGS, _MODE = 3, 6, 2, 10
_NET_NS = 6
_TTY, _TTY_INFO, _TTY_TYPE = 11, "tty-info.img", 2


@dataclass(frozen=True, slots=True)
class OpenFile:
    """An open file. kind: CRIU's number. entry: by field number. terminal: its type, or 0."""

    kind: int
    entry: Body
    terminal: int


@dataclass(frozen=True, slots=True)
class NamedFile:
    """A file that the restore opens by its path. flags: of open(2). mode: as of stat(2), or 0."""

    path: str
    flags: int
    mode: int


def open_files(directory: Path) -> Iterator[OpenFile]:
    """Returns all open files of a dump, also files that are mapped or lie in a socket's queue.

    Raises DamagedImage, OSError.
    """
    terminals = _terminals(directory / _TTY_INFO)
    for raw in images.entries(directory / "files.img"):
        entry = decoded(raw)
        kind = _number(entry, 1)
        terminal = 0
        if kind == _TTY:
            terminal = terminals.get(_number(decoded(_message(entry, 19)), 2), 0)
        yield OpenFile(kind, entry, terminal)


def named_files(directory: Path) -> Iterator[NamedFile]:
    """Returns the files, directories, devices and fifos that are open or mapped.

    Raises DamagedImage, OSError.
    """
    for raw in images.entries(directory / "files.img"):
        entry = decoded(raw)
        if _REGULAR in entry:
            found = decoded(_message(entry, _REGULAR))
            path = b"/" + _message(found, _NAME).lstrip(b"/")
            mode = _number(found, _MODE) if _MODE in found else 0
            yield NamedFile(path.decode("utf-8", "surrogateescape"), _number(found, _FLAGS), mode)


def network_namespace(directory: Path) -> int | None:
    """Returns CRIU's number of the network namespace of the captured processes, the same for all.

    None when it has none. Raises DamagedImage, OSError.
    """
    for path in directory.glob("ids-*.img"):
        ids = decoded(images.first(path))
        return _number(ids, _NET_NS) if _NET_NS in ids else None
    return None


def decoded(message: bytes) -> dict[int, list[Value]]:
    """Returns every field of a message by its number. Raises DamagedImage."""
    found: dict[int, list[Value]] = {}
    for number, start, at, end in images.fields(message):
        wire = message[start] & 7
        value: Value
        if wire == 0:
            value, _ = images.varint(message, at)
        elif wire == 2:
            value = message[at:end]
        else:
            value = struct.unpack("<Q" if wire == 1 else "<I", message[at:end])[0]
        found.setdefault(number, []).append(value)
    return found


def _terminals(path: Path) -> dict[int, int]:
    if not path.exists():
        return {}
    infos = map(decoded, images.entries(path))
    return {_number(info, 1): _number(info, _TTY_TYPE) for info in infos}


def _number(message: Body, field: int) -> int:
    value = message.get(field, [None])[-1]
    if not isinstance(value, int):
        raise DamagedImage(f"files.img: field {field} is no number")
    return value


def _message(message: Body, field: int) -> bytes:
    value = message.get(field, [None])[-1]
    if not isinstance(value, bytes):
        raise DamagedImage(f"files.img: field {field} is no message")
    return value
