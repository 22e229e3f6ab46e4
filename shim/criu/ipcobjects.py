"""Removes System V objects of other containers from CRIU's images. T2.

CRIU dumps an IPC namespace as a whole. Source: CRIU, criu/ipc_ns.c.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from google.protobuf.message import DecodeError, Message

from protos import criu_pb2
from shim.criu import sharedmem
from shim.criu.images import DamagedImage
from shim.kernel import replace

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from shim.kernel.sysvipc import Object

_LENGTH: Final = struct.Struct("<I")
_HEADER_BYTES: Final = 8
_VALUE_BYTES, _WHOLE_BYTES = 2, 8


def segments(objects: Iterable[Object]) -> set[int]:
    """Returns the ids of the objects that are shared memory."""
    return {each.number for each in objects if each.kind == "shm"}


def leave_out(criu: Path, objects: Iterable[Object]) -> None:
    """Remove these objects from the dump in `criu`. Raises DamagedImage, OSError."""
    numbers: dict[str, set[int]] = {"shm": set(), "sem": set(), "msg": set()}
    for each in objects:
        numbers[each.kind].add(each.number)
    for kind, left_out in numbers.items():
        for path in criu.glob(f"ipcns-{kind}-*.img") if left_out else ():
            data = path.read_bytes()
            kept = b"".join(
                raw for number, raw in _split(kind, data, path) if number not in left_out
            )
            path.write_bytes(data[:_HEADER_BYTES] + kept)
    known = sharedmem.objects(criu) if numbers["shm"] else {}
    for number in numbers["shm"]:
        if number in known:  # CRIU has one name for the lists of both
            raise DamagedImage(f"segment {number} has the number of other shared memory")
        replace.take_away(f"{criu}/pagemap-shmem-{number}.img")


class _Reader:
    def __init__(self, data: bytes, path: Path) -> None:
        self._data, self._path, self.at = data, path, _HEADER_BYTES

    def take(self, size: int) -> bytes:
        taken = self._data[self.at : self.at + size]
        if len(taken) < size:
            raise DamagedImage(f"{self._path.name}: cut at byte {self.at}")
        self.at += size
        return taken

    def entry(self, kind: type[Message]) -> Message:
        raw = self.take(_LENGTH.unpack(self.take(_LENGTH.size))[0])
        try:
            return kind.FromString(raw)
        except DecodeError as error:
            raise DamagedImage(f"{self._path.name}: {error}") from error

    @property
    def is_at_end(self) -> bool:
        return self.at >= len(self._data)


def _split(kind: str, data: bytes, path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields each object's number, and all its bytes."""
    reader = _Reader(data, path)
    while not reader.is_at_end:
        start = reader.at
        number = _pass_over(kind, reader)
        yield number, data[start : reader.at]


def _pass_over(kind: str, reader: _Reader) -> int:
    if kind == "shm":
        segment = reader.entry(criu_pb2.IpcShm)
        assert isinstance(segment, criu_pb2.IpcShm)  # noqa: S101 - for the type checker
        return segment.desc.id
    if kind == "sem":
        semaphores = reader.entry(criu_pb2.IpcSem)
        assert isinstance(semaphores, criu_pb2.IpcSem)  # noqa: S101 - for the type checker
        reader.take(_whole(semaphores.nsems * _VALUE_BYTES))
        return semaphores.desc.id
    queue = reader.entry(criu_pb2.IpcMsgQueue)
    assert isinstance(queue, criu_pb2.IpcMsgQueue)  # noqa: S101 - for the type checker
    for _ in range(queue.qnum):
        message = reader.entry(criu_pb2.IpcMsg)
        assert isinstance(message, criu_pb2.IpcMsg)  # noqa: S101 - for the type checker
        reader.take(_whole(message.msize))
    return queue.desc.id


def _whole(size: int) -> int:
    return -(-size // _WHOLE_BYTES) * _WHOLE_BYTES
