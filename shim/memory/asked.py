"""How CRIU asks for the content of shared memory, and is answered: by fifos in its images. Lean.

See `shim.memory.shared`. A fifo has an end of ours before CRIU is started, so that opening it does
not make CRIU wait, and reading does; inotify tells us which one it has opened. When no end is left
CRIU reads the end of the image.
"""

from __future__ import annotations

import contextlib
import os
import select
import time

from shim.kernel import survivors
from shim.kernel.inotify import Openings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_SEEN_WITHIN_S = 5.0
_POLL_S = 0.001


class NotFilled(Exception):
    """Shared memory could not be filled."""


class Asked:
    """The fifos in `view` with the names of `answers`, which is what CRIU is to read from each.

    Make it before CRIU is started. Raises OSError.
    """

    def __init__(self, container: str, view: str, answers: Mapping[str, bytes]) -> None:
        self._container, self._answers = container, answers
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fifos = {image: os.open(f"{view}/{image}", flags) for image in answers}
        # After our own opening, which so is not told.
        self._openings = Openings(f"{view}/{image}" for image in answers) if answers else None
        self._last = 0

    def filenos(self) -> list[int]:
        """Its descriptors."""
        return [*self._fifos.values(), *([self._openings.fileno()] if self._openings else [])]

    def close(self) -> None:
        """Close our ends, here. Idempotent."""
        for fd in self._fifos.values():
            os.close(fd)
        self._fifos = {}
        if self._openings:
            self._openings.close()
            self._openings = None

    def wait(self) -> list[str]:
        """Wait until CRIU asks for something; the images, in order."""
        assert self._openings is not None  # noqa: S101 - whoever waits has not closed it
        select.select([self._openings], [], [])
        return [os.path.basename(path) for path in self._openings.opened()]

    def asking(self, image: str) -> int:
        """The process of the container that has opened the fifo. Raises NotFilled.

        It is told of before the process has the descriptor.
        """
        wanted = os.fstat(self._fifos[image])
        until = time.monotonic() + _SEEN_WITHIN_S
        while time.monotonic() < until:
            if self._last and _has_open(self._last, wanted):
                return self._last
            for pid in survivors.newest_first(self._container):
                if _has_open(pid, wanted):
                    self._last = pid
                    return pid
            time.sleep(_POLL_S)
        raise NotFilled(f"no process of the container has {image} open")

    def answer(self, image: str) -> None:
        """Let CRIU go on. Raises OSError."""
        fd = self._fifos.pop(image)
        os.write(fd, self._answers[image])
        os.close(fd)


def _has_open(pid: int, wanted: os.stat_result) -> bool:
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(f"/proc/{pid}/fd/{name}"), wanted):
                    return True
    return False
