"""Gives a descriptor a single owner. Lean."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self


class OwnedFd:
    """A descriptor with a single owner. `steal` passes ownership on; else `with` closes it."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """Returns the descriptor, still owned here. Raises ValueError after `close` or `steal`."""
        if self._fd < 0:
            raise ValueError("the descriptor was closed or stolen")
        return self._fd

    def steal(self) -> int:
        """Returns the descriptor, which the caller owns now; -1 if it was closed or stolen."""
        fd, self._fd = self._fd, -1
        return fd

    def close(self) -> None:
        """Close the descriptor. A second call does nothing."""
        if (fd := self.steal()) >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
