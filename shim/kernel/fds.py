"""Descriptors with one owner. Lean."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self


class OwnedFd:
    """A descriptor with one owner. `steal` passes ownership on; leaving `with` closes the rest."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """The descriptor, still owned here. Raises ValueError when it was closed or stolen."""
        if self._fd < 0:
            raise ValueError("the descriptor was closed or stolen")
        return self._fd

    def steal(self) -> int:
        """The descriptor; whoever called this owns it now. -1 when there is none any more."""
        fd, self._fd = self._fd, -1
        return fd

    def close(self) -> None:
        """Close it. A second call does nothing."""
        if (fd := self.steal()) >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
