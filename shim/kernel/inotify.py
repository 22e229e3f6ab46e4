"""Watches files for being opened, by inotify(7). Lean."""

from __future__ import annotations

import os
import struct

from shim.kernel.libc import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_IN_OPEN = 0x20
_EVENT = struct.Struct("=iIII")
_READ_BYTES = 64 << 10


class Openings:
    """Reports openings of `paths`, through whichever mount. Raises OSError."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._fd = call("inotify_init1", os.O_CLOEXEC | os.O_NONBLOCK)
        self._paths = {
            call("inotify_add_watch", self._fd, path.encode(), _IN_OPEN, about=path): path
            for path in paths
        }

    def fileno(self) -> int:
        """Returns the descriptor, for poll."""
        return self._fd

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def opened(self) -> list[str]:
        """Returns the paths that were opened since the last call, in order. Raises OSError."""
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return []
        found = []
        at = 0
        while at < len(data):
            watch, _, _, name_bytes = _EVENT.unpack_from(data, at)
            at += _EVENT.size + name_bytes
            if watch in self._paths:
                found.append(self._paths[watch])
        return found
