"""Fills new device memory from the payload's files, beside the rest of a restore. Lean."""

from __future__ import annotations

import os
import threading
import time

from shim.gpu.direct import mover
from shim.gpu.direct.files import opened
from shim.gpu.direct.mover import Move
from shim.gpu.direct.pieces import Piece

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from shim.gpu.direct.device import DeviceMemory
    from shim.gpu.direct.gpus import Gpus

_MOST_PIECES = 1 << 20


class Load:
    """request: `about` as it was saved, `pairs` of UUIDs in hexadecimal, captured and new, and
    `digests` of the files that nothing else vouches for: {file: [of each chunk]}.
    """

    def __init__(self, gpus: Gpus, dirfd: int, request: Mapping[str, Any]) -> None:
        about = request["about"]
        if (about["chunk"], about["files"]) != (mover.CHUNK_BYTES, mover.FILES):
            raise ValueError("the payload has another layout than this quickthaw writes")
        new = dict(request.get("pairs") or [])
        self._uuids = [bytes.fromhex(new.get(uuid, uuid)) for uuid in about["gpus"]]
        self._processes = about["processes"]
        self._error: BaseException | None = None
        self.times: list[tuple[str, float, float]] = []
        self._memory: list[list[DeviceMemory]] = [[] for _ in self._uuids]
        self._threads = [
            threading.Thread(
                target=self._guarded, args=(gpus, dirfd, index, request.get("digests") or {}),
                daemon=True,
            )
            for index in range(len(self._uuids))
        ]  # fmt: skip
        for thread in self._threads:
            thread.start()

    def by_process(self, until: float) -> dict[int, list[Piece]]:
        """When all is loaded: the pieces of each process, by its own number.

        Raises what a thread raised, TimeoutError.
        """
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                raise TimeoutError("device memory was not loaded in time")
        if self._error is not None:
            raise self._error
        rest = [iter(memory) for memory in self._memory]
        return {
            process["pid"]: [Piece(number, next(rest[gpu])) for number, _, gpu in process["pieces"]]
            for process in self._processes
        }

    def _sizes(self, gpu: int) -> Sequence[int]:
        sizes = [
            octets
            for process in self._processes
            for _, octets, index in process["pieces"]
            if index == gpu
        ]
        if len(sizes) > _MOST_PIECES:
            raise ValueError(f"{len(sizes)} pieces")
        return sizes

    def _guarded(
        self, gpus: Gpus, dirfd: int, index: int, digests: Mapping[str, Sequence[str]]
    ) -> None:
        try:
            sizes = self._sizes(index)
            began = time.monotonic()
            ring = gpus.ring(self._uuids[index], of=len(self._uuids))
            context = time.monotonic()
            self._memory[index] = [ring.gpu.created(size) for size in sizes]
            created = time.monotonic()
            named = [digests.get(mover.name(index, file)) for file in range(mover.FILES)]
            with opened(dirfd, index, os.O_RDONLY) as fds:
                check = mover.compared(named) if any(named) else None
                Move(ring, self._memory[index], fds).load(mover.layout(sizes), check)
            of = f"_{index}" if index else ""
            self.times += [
                (f"gpu_context{of}", began, context), (f"gpu_pieces{of}", context, created),
                (f"gpu_load{of}", created, time.monotonic()),
            ]  # fmt: skip
        except BaseException as error:  # noqa: BLE001 - raised by whoever waits for it
            self._error = self._error or error
