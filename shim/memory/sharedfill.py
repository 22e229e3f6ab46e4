"""Fills one object of shared memory, which is empty and which nobody else uses yet. Lean.

Whole huge pages of content are made as such, and copied over: the object takes no more memory than
it took. What is left, and what the kernel makes no huge page of, is filled with UFFDIO_COPY.

`write` would lock the object, so that threads cannot fill it together, and a small page that is
made by touching it is zeroed first, one fault for each.
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
    from shim.memory.payload import Payload

    Job = Callable[[], None]

THREADS = min(8, os.cpu_count() or 1)
_LITTLE_BYTES = 4 << 20
"""What is no more than this is filled by one thread."""


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
    """Where there is content for a whole huge page, in one extent."""
    for start, end, _ in found.extents:
        yield from blocks(start, end)


def _fill_huge(
    huge: HugePages, address: int, payload: Payload, piece: Extent, rest: list[Extent]
) -> None:
    """Fill one huge page, or what there is of it. rest: gets what has still to be filled."""
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
