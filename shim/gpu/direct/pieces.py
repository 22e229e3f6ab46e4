"""Pieces of device memory that wait to be given to a process. Lean."""

from __future__ import annotations

import os

from shim.gpu.direct import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from shim.gpu.direct.device import DeviceMemory

GROUP_BYTES = 1 << 30
"""So much is twice on the device while it is given."""


class Piece:
    """number: in its process. fd: where it came from; a piece made here has none until it goes."""

    __slots__ = ("_fd", "memory", "number")

    def __init__(self, number: int, memory: DeviceMemory, fd: int = -1) -> None:
        self.number, self.memory, self._fd = number, memory, fd

    def descriptor(self) -> int:
        """For its process. The driver exports no imported memory: its own descriptor is kept."""
        if self._fd < 0:
            self._fd = self.memory.export()
        return self._fd

    def close(self) -> None:
        """Let it go here. Idempotent."""
        self.memory.close()
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def groups(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Some at a time: of GROUP_BYTES together, or one that is larger, and of one message."""
    group: list[Piece] = []
    octets = 0
    for piece in pieces:
        if group and (octets + piece.memory.octets > GROUP_BYTES or len(group) == wire.BATCH):
            yield group
            group, octets = [], 0
        group.append(piece)
        octets += piece.memory.octets
    if group:
        yield group
