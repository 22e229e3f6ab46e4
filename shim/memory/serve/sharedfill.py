"""Fills an object of shared memory, which is empty and which nobody else uses yet. Lean.

Content for a whole huge page gets a huge page, and is copied over: the object takes no more memory
than at its capture. UFFDIO_COPY fills the rest, and the blocks for which the kernel makes no huge
page.

`write` would lock the object, so that threads could not fill it together; and the kernel zeroes a
small page that is made by touching it, with a page fault for each.
"""

from __future__ import annotations

import os
import threading
from functools import partial
from queue import SimpleQueue

from shim.integrity.chunks import CHUNK_BYTES
from shim.kernel import userfault
from shim.kernel.hugepages import HUGE_BYTES, HugePages, blocks
from shim.kernel.libc import copy_memory
from shim.memory.extents import Extents

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from shim.memory.extents import Extent
    from shim.memory.layout import SharedLayout
    from shim.memory.serve.payload import Payload

    Job = Callable[[], None]

THREADS = min(8, os.cpu_count() or 1)
_LITTLE_BYTES = 4 << 20
"""A single thread fills up to this much."""


def fill(address: int, found: SharedLayout, payload: Payload, threads: Threads) -> None:
    """Fill the object that is mapped, writable, at `address`, a multiple of HUGE_BYTES.

    Raises Damaged, OSError.
    """
    left = Extents(found.extents)
    huge = HugePages()
    pieces = [piece for start in _blocks(found) for piece in left.take(start, start + HUGE_BYTES)]
    rest: list[Extent] = []
    jobs = [partial(_fill_huge, huge, address, payload, piece, rest) for piece in pieces]
    _run(threads, jobs, len(jobs) * HUGE_BYTES)
    left.put(rest)
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


def _blocks(found: SharedLayout) -> Iterator[int]:
    """Yields the offset of each huge page whose content lies in a single extent."""
    for start, end, _ in found.extents:
        yield from blocks(start, end)


def _fill_huge(
    huge: HugePages, address: int, payload: Payload, piece: Extent, rest: list[Extent]
) -> None:
    """Fill a huge page, as far as the kernel has made it. rest: gets the extent left to fill."""
    start, end, offset = piece
    made = huge.make(address + start)
    for to, source, size in _parts(payload, address + start, offset, made):
        copy_memory(to, source, size)
    if start + made < end:
        rest.append((start + made, end, offset + made))  # is atomic


def _fill(fd: int, address: int, payload: Payload, piece: Extent) -> None:
    start, end, offset = piece
    for to, source, size in _parts(payload, address + start, offset, end - start):
        userfault.copy_all(fd, to, source, size)


def _parts(
    payload: Payload, address: int, offset: int, size: int
) -> Iterator[tuple[int, int, int]]:
    """Yields target address, source address and size of each copy.

    A source is valid until the next copy is asked for.
    """
    done = 0
    while done < size:
        with payload.at(offset + done, size - done) as (source, there):
            yield address + done, source, there
        done += there


def _pieces(extents: Extents) -> Iterator[Extent]:
    """Yields pieces that lie in a chunk of the payload, so that each chunk is checked once."""
    for start, end, offset in extents:
        at = start
        while at < end:
            place = offset + at - start
            until = min(end, at + CHUNK_BYTES - place % CHUNK_BYTES)
            yield at, until, place
            at = until


class Threads:
    """Runs jobs. The threads start before the process joins a cgroup that limits their number."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Job] = SimpleQueue()
        self._ends: SimpleQueue[Exception | None] = SimpleQueue()
        for _ in range(THREADS):
            threading.Thread(target=self._work, daemon=True).start()

    def run(self, jobs: Sequence[Job]) -> None:
        """Run all jobs. When all have ended, raises the exception of the first that failed."""
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
