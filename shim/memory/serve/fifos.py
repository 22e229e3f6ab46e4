"""Answers CRIU's requests for the content of shared memory, through fifos in its images. Lean.

See `shim.memory.serve.shared`. We open both ends of each fifo before CRIU starts, so that CRIU does
not wait when it opens a fifo, but does wait when it reads. inotify tells us which fifo CRIU has
opened. When the last writing end is closed, CRIU reads the end of the image.
"""

from __future__ import annotations

import contextlib
import os
import select
import time

from shim.kernel import procfs, survivors
from shim.kernel.inotify import Openings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_SEEN_WITHIN_S = 5.0
_POLL_S = 0.001


class NotFilled(Exception):
    """Shared memory could not be filled."""


class Asked:
    """Holds the fifos in `view`. answers: for each fifo's name, the bytes for CRIU to read.

    Create it before CRIU starts. Raises OSError.
    """

    def __init__(self, container: str, view: str, answers: Mapping[str, bytes]) -> None:
        self._container, self._answers = container, answers
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fifos = {image: os.open(f"{view}/{image}", flags) for image in answers}
        # After our own openings, so that inotify does not report them.
        self._openings = Openings(f"{view}/{image}" for image in answers) if answers else None
        self._last = 0

    def filenos(self) -> list[int]:
        """Returns the descriptors of the fifos and of inotify."""
        return [*self._fifos.values(), *([self._openings.fileno()] if self._openings else [])]

    def close(self) -> None:
        """Close our descriptors in this process. Idempotent."""
        for fd in self._fifos.values():
            os.close(fd)
        self._fifos = {}
        if self._openings:
            self._openings.close()
            self._openings = None

    def wait(self) -> list[str]:
        """Wait until CRIU opens fifos. Returns the images' names, in the order of the openings."""
        assert self._openings is not None  # noqa: S101 - whoever waits has not closed it
        select.select([self._openings], [], [])
        return [os.path.basename(path) for path in self._openings.opened()]

    def asking(self, image: str) -> int:
        """Returns the pid of the container's process that has opened the fifo. Raises NotFilled.

        inotify reports an opening before the process has the descriptor: hence the polling.
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
        raise NotFilled(f"no process of the container opened {image} within {_SEEN_WITHIN_S:.0f} s")

    def answer(self, image: str) -> None:
        """Write the answer for an image, so that CRIU goes on. Raises OSError."""
        fd = self._fifos.pop(image)
        os.write(fd, self._answers[image])
        os.close(fd)


def _has_open(pid: int, wanted: os.stat_result) -> bool:
    with contextlib.suppress(OSError):
        for name in procfs.descriptors(pid):
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(f"/proc/{pid}/fd/{name}"), wanted):
                    return True
    return False
