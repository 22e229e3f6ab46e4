"""Reads a snapshot into the page cache while its pod is still being set up.

This begins at RunPodSandbox: meanwhile the node pulls the image, makes the network and creates the
container. Only the decision makes certain which snapshot is restored; before it, prefetch guesses
by the annotation and the pod's name, and a wrong guess costs nothing but reading. Restores of the
same snapshot share the page cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from typing import TYPE_CHECKING

from shim.capture.sequence import finished
from shim.contract.errors import NoSuchSnapshot
from shim.contract.paths import DATA_SUFFIX, SNAPSHOT_CRIU, SNAPSHOT_MEMORY
from shim.criu.family import PREFIX
from shim.kernel.beneath import open_beneath, open_dir
from shim.kernel.meminfo import available_bytes
from shim.kernel.stopping import Stop, Stopped

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from shim.contract.manifest import Manifest
    from shim.daemon.tracked import Pod
    from shim.store.store import Store

log = logging.getLogger(__name__)

_STEP_BYTES = 8 << 20
"""Size of a request to the kernel: between two requests prefetch sees whether to go on."""
_AGAIN_S = 10.0
"""Files read less than this ago are still in the page cache, or memory has no room for them."""


class Prefetch:
    """Call the methods on the event loop. A thread reads, one snapshot at a time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._queue: asyncio.Queue[Manifest] = asyncio.Queue()
        self._last: dict[str, float] = {}
        self._stop = Stop()

    def guess(self, pod: Pod, wanted: Iterable[str]) -> None:
        """Prefetch for a pod that is coming. wanted: the snapshots that its annotations name."""
        for name in wanted:
            if found := self._guessed(pod, name):
                self._begin(found)

    def certain(self, snapshot: str) -> None:
        """Prefetch the snapshot that a container is about to start from."""
        with contextlib.suppress(NoSuchSnapshot):
            self._begin(self._store.get(snapshot))

    def _begin(self, found: Manifest) -> None:
        now = time.monotonic()
        if now - self._last.get(found.id, -_AGAIN_S) >= _AGAIN_S:
            self._last = {each: when for each, when in self._last.items() if now - when < _AGAIN_S}
            self._last[found.id] = now
            self._queue.put_nowait(found)

    async def serve(self) -> None:
        """Read the queued snapshots, until cancelled."""
        while True:
            found = await self._queue.get()
            await finished(asyncio.to_thread(self._read, found), self._stop)

    def _guessed(self, pod: Pod, wanted: str) -> Manifest | None:
        found = self._store.find(namespace=pod.namespace)
        if wanted != "auto":
            named = wanted.removeprefix("sha256:")
            return next((each for each in found if named in (each.id, each.name)), None)
        if len(found) < 2:
            return found[0] if found else None
        # The pods of a controller have the same name but for its end.
        alike = [each for each in found if _stem(each.source.pod) == _stem(pod.name)]
        return max(alike, key=self._store.last_use, default=None)

    def _read(self, found: Manifest) -> None:
        """Read. Blocking. Ignores failures: the restore meets the same failure, and reports it."""
        began, size = time.monotonic(), 0
        with contextlib.suppress(OSError, Stopped):
            for path in _payloads(self._store.snapshots / found.id):
                with (
                    open_dir(str(path.parent)) as directory,
                    open_beneath(directory.fileno(), path.name, os.O_RDONLY) as file,
                ):
                    size += self._read_file(file.fileno())
        took_s = time.monotonic() - began
        log.debug("prefetched %d MiB of %s in %.3f s", size >> 20, found.id[:12], took_s)

    def _read_file(self, fd: int) -> int:
        size = os.fstat(fd).st_size
        at = 0
        while at < size and available_bytes() > 2 * (size - at):
            self._stop.check()
            os.posix_fadvise(fd, at, _STEP_BYTES, os.POSIX_FADV_WILLNEED)
            at += _STEP_BYTES
        return min(at, size)


def _payloads(snapshot: Path) -> list[Path]:
    """Returns the files that memory is copied from, the small files first."""
    found = [path for path in (snapshot / SNAPSHOT_MEMORY).iterdir() if path.suffix == DATA_SUFFIX]
    found += (snapshot / SNAPSHOT_CRIU).glob(f"{PREFIX}pages-*.img")
    return sorted(found, key=lambda path: path.lstat().st_size)


def _stem(name: str) -> str:
    return name.rpartition("-")[0] or name
