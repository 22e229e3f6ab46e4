"""Copies the memory of a container while it runs, and completes the copy while it is frozen.

CRIU lists the pages of every process and of every object of shared memory. We copy their content
ourselves, on several threads: most of it before the freeze (pre-copy). In the frozen window, beside
CRIU, we bring up to date the ranges that were written since: the kernel names them, or we compare
everything with the present memory. At last we copy the pages that CRIU lists and we do not have:
new pages, and pages that CRIU may change during its dump (code, into which CRIU puts system calls
for the process). So the copy is exact, however much the process has written meanwhile, and whatever
was mapped, unmapped or moved.
"""

from __future__ import annotations

import contextlib
import os
import time
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Final, Self, TypeVar

from shim.contract.paths import DATA_SUFFIX
from shim.criu import devnull, pagemap, sharedmem
from shim.kernel import othermemory, procfs, sharedobjects, smaps
from shim.kernel.stopping import Stop
from shim.memory.copy.copied import CopiedMemory, CopiedSpace
from shim.memory.copy.readable import OfObject, OfProcess
from shim.memory.copy.spacecopy import JOB_BYTES, SpaceCopy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from shim.criu.pagemap import Pagemap
    from shim.kernel.othermemory import Range
    from shim.kernel.smaps import FlaggedArea
    from shim.memory.copy.spacecopy import Batch

_THREADS: Final = min(8, os.cpu_count() or 1)
_BESIDE_CRIU: Final = max(1, _THREADS - 1)
"""A frozen container waits for CRIU: a processor is reserved for CRIU."""
Job = TypeVar("Job")
_ROUNDS = 3
_LITTLE_BYTES = 64 << 20
"""After a round that copied no more than this, the frozen window copies the rest."""


_MAX_LISTED_BYTES = 16 << 20
"""The limit for CRIU's lists of pages. Every second page of 8 GiB takes more, and a process can
have such pages on purpose: no process shall stand still, and no daemon grow, for so long."""
_MAX_PIECES = 1 << 20
"""About the largest number of entries in such lists."""


class MemoryCopy:
    """A copy, of a container whose first process is `init_pid`, into files in `directory`.

    until: the deadline on `time.monotonic`. stop: ends the copy earlier. Leaving the context ends
    the threads. All methods raise OSError; ValueError for memory that cannot be copied;
    TimeoutError, Stopped.
    """

    def __init__(
        self, init_pid: int, directory: Path, until: float, stop: Stop | None = None
    ) -> None:
        self._level = len(procfs.numbers(init_pid)) - 1
        self._directory, self._until = directory, until
        self._stop = stop or Stop()
        self._spaces: dict[int, SpaceCopy] = {}
        self._objects: dict[int, SpaceCopy] = {}
        self._undo = contextlib.ExitStack()
        self._going: list[Future[None]] = []
        self._areas: dict[int, Future[list[FlaggedArea]]] = {}
        self._serving: Callable[[], None] | None = None
        self._stopped = False

    def __enter__(self) -> Self:
        self._threads = self._undo.enter_context(ThreadPoolExecutor(_THREADS, "memory"))
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._undo.close()  # waits for the threads, and then closes the files
        for copy in self._all():
            copy.close()

    def _all(self) -> list[SpaceCopy]:
        return [*self._spaces.values(), *self._objects.values()]

    def precopy(self, pids: Sequence[int]) -> None:
        """Copy the present memory while the processes run."""
        for pid in pids:
            with contextlib.suppress(OSError):  # the process has ended
                self._space(pid).memory.watch()
        for number, path in sharedobjects.found(pids).items():
            with contextlib.suppress(OSError):
                self._object(number, path)
        for _ in range(_ROUNDS):
            before = self.size
            self._each(self._new_pages(), lambda job: job[0].copy(job[1]))
            if self.size - before <= _LITTLE_BYTES:
                break
        for copy in self._all():
            copy.map()

    def precopy_new(self) -> None:
        """Copy the memory that appeared since `precopy` in the same processes."""
        self._each(self._new_pages(), lambda job: job[0].copy(job[1]))
        for copy in self._all():
            copy.map()

    @property
    def size(self) -> int:
        """The number of bytes copied so far."""
        return sum(copy.size for copy in self._all())

    def compare(
        self,
        pids: Sequence[int],
        until: float | None = None,
        *,
        with_new: bool = False,
        areas: bool = False,
    ) -> frozenset[int]:
        """Begin to bring the copy up to date. The processes are frozen from now on.

        until: another deadline from now on. with_new: also look for pages that appeared since, and
        copy them beside CRIU; without, `complete` copies them. areas: whether to read the flags of
        all areas, too. Returns the numbers of the objects of shared memory that have a copy.
        """
        self._until = self._until if until is None else until
        here = {pid: procfs.numbers(pid)[self._level] for pid in pids}
        if areas:
            self._areas = {here[pid]: self._threads.submit(smaps.areas, pid) for pid in here}
        for pid, space in list(self._spaces.items()):
            if here.get(pid) != space.number:
                self._spaces.pop(pid).discard()
        for pid in here:
            self._space(pid)
        objects = sharedobjects.found(pids)
        for number in self._objects.keys() - objects.keys():
            self._objects.pop(number).discard()
        for number, path in objects.items():
            # Opened again: instead of asking whether the object is the same, compare its content.
            self._object(number, path).reopen(OfObject(path, number))
        new = [partial(copy.copy, job) for copy, job in self._new_pages()] if with_new else []
        due = [partial(copy.renew, batch) for copy in self._all() for batch in _still_there(copy)]
        self._start([*new, *due], lambda job: job(), _BESIDE_CRIU)
        return frozenset(objects)

    def complete(self, criu: Path) -> CopiedMemory:
        """Copy the missing pages that CRIU lists in `criu`. The processes are still frozen."""
        self._more(_THREADS - _BESIDE_CRIU)
        self._wait()
        images = self._images(criu)
        if sum((criu / name).stat().st_size for name in images) > _MAX_LISTED_BYTES:
            raise ValueError("its memory is in too many pieces")
        listed = {copy: pagemap.read(criu / name) for name, copy in images.items()}
        for number, copy in list(self._objects.items()):
            if copy not in listed:  # CRIU has the content, or does not want it
                self._objects.pop(number).discard()
        self._each(_missing(listed), lambda job: job[0].copy(job[1], forced=True))
        found = [
            CopiedSpace(
                copy.number, copy.path, pages, copy.content(), copy.zeros(), self._flags(copy)
            )
            for copy, pages in listed.items()
        ]
        return CopiedMemory(found[: len(self._spaces)], found[len(self._spaces) :])

    def _flags(self, copy: SpaceCopy) -> Sequence[FlaggedArea]:
        reading = None if copy in self._objects.values() else self._areas.get(copy.number)
        return () if reading is None else reading.result()

    def _images(self, criu: Path) -> dict[str, SpaceCopy]:
        """Returns by name the images that list pages whose content CRIU lacks: processes first."""
        images = {path.name for path in criu.glob("pagemap-[0-9]*.img")}
        of = {f"pagemap-{space.number}.img": space for space in self._spaces.values()}
        if images != of.keys():
            odd = ", ".join(sorted(images ^ of.keys()))
            raise ValueError(f"CRIU has dumped other processes than were frozen: {odd}")
        for path in devnull.without_content(criu):
            number = sharedmem.number_of(path)
            if number not in self._objects:
                raise ValueError(f"nobody has the content of shared memory {number}")
            of[path.name] = self._objects[number]
        return of

    def _space(self, pid: int) -> SpaceCopy:
        if pid not in self._spaces:
            number = procfs.numbers(pid)[self._level]
            path = self._directory / f"space-{number}{DATA_SUFFIX}"
            self._spaces[pid] = SpaceCopy(OfProcess(pid, number), number, path)
        return self._spaces[pid]

    def _object(self, number: int, path: str) -> SpaceCopy:
        if number not in self._objects:
            data = self._directory / f"shared-{number}{DATA_SUFFIX}"
            self._objects[number] = SpaceCopy(OfObject(path, number), number, data)
        return self._objects[number]

    def _new_pages(self) -> Iterator[tuple[SpaceCopy, list[Range]]]:
        for copy in self._all():
            with contextlib.suppress(OSError):
                there = islice(copy.memory.pages(), _MAX_PIECES)
                yield from ((copy, job) for job in _jobs(without(there, copy.known())))

    def _each(self, jobs: Iterable[Job], work: Callable[[Job], None]) -> None:
        self._start(jobs, work)
        self._wait()

    def _start(
        self, jobs: Iterable[Job], work: Callable[[Job], None], threads: int = _THREADS
    ) -> None:
        left = iter(list(jobs))  # next() of a list's iterator is atomic, a generator's is not
        self._serving = partial(self._serve, left, work)
        self._more(threads)

    def _more(self, threads: int) -> None:
        """Have more threads serve the jobs that were started last."""
        if self._serving:
            self._going += [self._threads.submit(self._serving) for _ in range(threads)]

    def _serve(self, left: Iterator[Job], work: Callable[[Job], None]) -> None:
        for job in left:
            if self._stopped:
                return
            self._stop.check()
            if time.monotonic() > self._until:
                raise TimeoutError("copying the memory took too long")
            try:
                work(job)
            except BaseException:
                self._stopped = True
                raise

    def _wait(self) -> None:
        for each in self._going:
            each.result()
        self._going = []


def _still_there(copy: SpaceCopy) -> list[Batch]:
    """Returns the batches to read again: they lie in areas that are still of the same kind."""
    areas = copy.memory.areas()
    if areas is None:
        return copy.take(lambda _: True)
    merged = merge(areas)
    starts = [start for start, _ in merged]

    def inside(start: int, end: int) -> bool:
        at = bisect_right(starts, start) - 1
        return at >= 0 and end <= merged[at][1]

    return copy.take(lambda batch: all(inside(*each) for each in batch.ranges()))


def _missing(
    listed: dict[SpaceCopy, Pagemap],
) -> Iterator[tuple[SpaceCopy, list[Range]]]:
    for copy, found in listed.items():
        wanted = [(each.start, each.end) for each in found.pages]
        yield from ((copy, job) for job in _jobs(without(wanted, copy.known())))


def merge(ranges: Iterable[Range]) -> list[Range]:
    """Returns the same addresses in order, in as few ranges as possible."""
    found: list[Range] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def without(ranges: Iterable[Range], known: Sequence[Range]) -> Iterator[Range]:
    """Yields the parts of `ranges` that are not in `known`. Both are sorted and disjoint."""
    at = 0
    for first, end in ranges:
        start = first
        while at < len(known) and known[at][1] <= start:
            at += 1
        following = at
        while following < len(known) and known[following][0] < end:
            if start < known[following][0]:
                yield start, known[following][0]
            start = max(start, known[following][1])
            following += 1
        if start < end:
            yield start, end


def _jobs(ranges: Iterable[Range]) -> Iterator[list[Range]]:
    """Yields ranges in portions for a single call."""
    job: list[Range] = []
    size = 0
    for first, end in ranges:
        start = first
        while start < end:
            stop = min(end, start + JOB_BYTES - size)
            job.append((start, stop))
            size, start = size + stop - start, stop
            if size == JOB_BYTES or len(job) == othermemory.MAX_RANGES:
                yield job
                job, size = [], 0
    if job:
        yield job
