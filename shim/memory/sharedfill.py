"""Fills one object of shared memory, which is empty and which nobody else uses yet. Lean.

Whole huge pages of content are made as such: one small page, which the kernel collapses to a huge
one whose rest is zeros, and a copy over all of it. That takes half as long as 512 small ones, and
the object takes no more memory than it took. What is left, and what the kernel makes no huge page
of, is filled with UFFDIO_COPY.

`write` would lock the object, so that threads cannot fill it together, and a small page that is
made by touching it is zeroed first, one fault for each.
"""

from __future__ import annotations

import os
import threading
from functools import partial
from queue import SimpleQueue
from time import thread_time

from shim.integrity.chunks import CHUNK_BYTES
from shim.kernel import userfault
from shim.kernel.libc import collapse, copy_memory, populate_write
from shim.memory.extents import Extents
from shim.memory.huge import HUGE_BYTES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from shim.memory.extents import Extent
    from shim.memory.layout import SharedLayout
    from shim.memory.payload import Payload

    Job = Callable[[], None]

THREADS = min(8, os.cpu_count() or 1)
_LITTLE_BYTES = 4 << 20
"""What is no more than this is filled by one thread."""
_SLOW_S = 0.0005
"""Of a processor. A huge page that takes longer to be made is no gain: memory is being compacted,
or the host of a virtual machine has to give it back."""
_AGAINST = 8
"""When so many more came slowly or not at all than quickly, no more are made."""


def fill(address: int, found: SharedLayout, payload: Payload, threads: Threads) -> None:
    """Fill the object that is mapped, writable, at `address`, a multiple of HUGE_BYTES.

    Raises Damaged, OSError.
    """
    left = Extents(found.extents)
    huge = _HugePages()
    pieces = [piece for start, end in _blocks(found.extents) for piece in left.take(start, end)]
    jobs = [partial(huge.fill, address, payload, piece) for piece in pieces]
    _run(threads, jobs, len(jobs) * HUGE_BYTES)
    left.put(huge.left)
    if not left:
        return
    with userfault.registered(address, found.size) as fd:
        jobs = [partial(_fill, fd, address, payload, piece) for piece in _pieces(left)]
        _run(threads, jobs, sum(end - start for start, end, _ in left))


def _run(threads: Threads, jobs: Sequence[Job], size: int) -> None:
    if size > _LITTLE_BYTES:
        threads.run(jobs)
    else:
        for job in jobs:
            job()


def _blocks(extents: Sequence[Extent]) -> Iterator[tuple[int, int]]:
    """Where there is content for a whole huge page, in one extent."""
    for start, end, _ in extents:
        first = -(-start // HUGE_BYTES) * HUGE_BYTES
        for at in range(first, end - HUGE_BYTES + 1, HUGE_BYTES):
            yield at, at + HUGE_BYTES


class _HugePages:
    """left: what has still to be filled, when all calls of `fill` have returned."""

    def __init__(self) -> None:
        self.left: list[Extent] = []
        self._against = 0

    def fill(self, address: int, payload: Payload, piece: Extent) -> None:
        """Fill one huge page, or what there is of it. Called by several threads. Raises Damaged,
        OSError.
        """
        start, end, offset = piece
        if self._against >= _AGAINST:
            self.left.append(piece)  # is atomic
            return
        began = thread_time()
        populate_write(address + start, userfault.PAGE)
        try:
            collapse(address + start, end - start)
            is_quick = thread_time() - began < _SLOW_S
        except OSError:
            is_quick = False
            self.left.append((start + userfault.PAGE, end, offset + userfault.PAGE))
            end = start + userfault.PAGE
        self._against = max(self._against - 1, 0) if is_quick else self._against + 1
        for to, source, size in _parts(payload, address + start, offset, end - start):
            copy_memory(to, source, size)


def _fill(fd: int, address: int, payload: Payload, piece: Extent) -> None:
    start, end, offset = piece
    for to, source, size in _parts(payload, address + start, offset, end - start):
        userfault.copy_all(fd, to, source, size)


def _parts(
    payload: Payload, address: int, offset: int, size: int
) -> Iterator[tuple[int, int, int]]:  # fmt: skip
    """Where content has to be copied to, where it is, valid until the next one, and its size."""
    done = 0
    while done < size:
        with payload.at(offset + done, size - done) as (source, there):
            yield address + done, source, there
        done += there


def _pieces(extents: Extents) -> Iterator[Extent]:
    """Each in one chunk of the payload, which so is checked once."""
    for start, end, offset in extents:
        at = start
        while at < end:
            place = offset + at - start
            until = min(end, at + CHUNK_BYTES - place % CHUNK_BYTES)
            yield at, until, place
            at = until


class Threads:
    """They are there before the process is where the number of threads is limited."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Job] = SimpleQueue()
        self._ends: SimpleQueue[Exception | None] = SimpleQueue()
        for _ in range(THREADS):
            threading.Thread(target=self._work, daemon=True).start()

    def run(self, jobs: Sequence[Job]) -> None:
        """Do all. Raises what the first one that failed has raised, when all have ended."""
        for job in jobs:
            self._jobs.put(job)
        errors = [self._ends.get() for _ in jobs]
        for error in errors:
            if error:
                raise error

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            error = None
            try:
                job()
            except Exception as failed:  # noqa: BLE001 - `run` raises it
                error = failed
            self._ends.put(error)
