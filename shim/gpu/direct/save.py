"""Saves device memory to the payload's files, in threads beside everything else. Lean."""

from __future__ import annotations

import os
import threading
import time

from shim.gpu.direct import mover
from shim.gpu.direct.files import opened
from shim.gpu.direct.mover import Move

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from shim.gpu.direct.device import DeviceMemory
    from shim.gpu.direct.gpus import Gpus


class Save:
    """about: what the loader must know; its files are made here. error: why it failed."""

    def __init__(
        self,
        gpus: Gpus,
        dirfd: int,
        about: Mapping[str, Any],
        memory: Mapping[bytes, Sequence[DeviceMemory]],
    ) -> None:
        self.about = about
        self.error: BaseException | None = None
        self.began, self.ended = time.monotonic(), 0.0
        self._threads = [
            threading.Thread(target=self._guarded, args=(gpus, dirfd, index, uuid, pieces))
            for index, (uuid, pieces) in enumerate(sorted(memory.items()))
        ]
        for uuid in memory:
            gpus.ring(uuid, of=len(memory))
        for thread in self._threads:
            thread.daemon = True
            thread.start()

    def wait(self, until: float) -> None:
        """Until all is saved, or failed. Raises TimeoutError."""
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                raise TimeoutError("device memory was not saved in time")

    @property
    def is_going_on(self) -> bool:
        """Whether the memory is still being read."""
        return any(thread.is_alive() for thread in self._threads)

    def _guarded(
        self, gpus: Gpus, dirfd: int, index: int, uuid: bytes, memory: Sequence[DeviceMemory]
    ) -> None:
        try:
            with opened(dirfd, index, os.O_RDWR | os.O_CREAT | os.O_EXCL) as fds:
                chunks = mover.layout([piece.octets for piece in memory])
                Move(gpus.ring(uuid), memory, fds).save(chunks)
            self.ended = time.monotonic()
        except BaseException as error:  # noqa: BLE001 - raised by whoever waits for it
            self.error = self.error or error
