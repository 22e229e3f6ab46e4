"""Fills, in threads, the memory that no process has asked for yet.

A single thread begins while CRIU restores, because CRIU keeps one processor busy: the thread makes
page tables for the content, and fills the working set as soon as CRIU has an area ready. When the
processes run, all threads fill the rest.

The threads copy side by side. To read the events of an address space, `hold` the threads first:
then no copy is under way, and each thread has filled or put back the extent that it had taken. The
threads run at a low priority: the workload comes first, and a page fault before everything.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque

from shim.kernel import priority
from shim.kernel.userfault import Gone
from shim.memory.serve.bursts import ASIDE_S, Bursts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from shim.memory.extents import Extent
    from shim.memory.serve.payload import Payload
    from shim.memory.serve.space import Space

PIECE_BYTES = 2 << 20
"""Copied at once. A page fault waits for a copy that is under way: half a millisecond."""
ASKED_BYTES = 256 << 10
"""The same while page faults come: small copies take longer in all, but a fault waits less."""
NICE = 10
THREADS = min(4, os.cpu_count() or 1)
_LOOK_S = 0.001
_LOOKS = 16
"""The number of places where we look for a ready area before we do something else."""
_CHANGING_S = 0.0005
_REFUSED_S = 0.05
_NO_MEMORY_S = 10.0
"""How long the kernel may refuse pages, as at the container's memory limit."""


class Stuck(Exception):
    """The kernel refused pages for too long."""


class Filling:
    """Runs the threads. spaces: see `add`. error: the exception that ended a thread."""

    def __init__(self, threads: int = THREADS) -> None:
        self.error: Exception | None = None
        self.told_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Readable when all is filled, or when a thread has failed."""
        self.spaces: list[Space] = []
        self._by_pid: dict[int, Space] = {}
        self._first: deque[tuple[int, int, int]] = deque()
        self._ahead: Iterator[tuple[Payload, int, int]] = iter(())
        self._is_early = True
        self._mutex = threading.Lock()
        self._held = self._stopped = False
        self._refused_since = 0.0
        self._bursts = Bursts()
        self._open, self._work = threading.Event(), threading.Event()
        self._locks = [threading.Lock() for _ in range(threads)]
        self._threads = [
            threading.Thread(target=self._serve, args=(lock,), daemon=True) for lock in self._locks
        ]

    def begin(
        self, first: Iterable[tuple[int, int, int]], ahead: Iterable[tuple[Payload, int, int]]
    ) -> None:
        """Start the first thread, while CRIU restores.

        first: pid, first address and end of each range that is filled before all else, in about
        this order. ahead: payload, offset and size of content that is needed soon.
        """
        self._first, self._ahead = deque(first), iter(ahead)
        self._open.set()
        self._work.set()
        self._threads[0].start()

    def start(self) -> None:
        """Fill everything: all areas are ready and the processes are about to run."""
        self._is_early = False
        for thread in self._threads[1:]:
            thread.start()

    def add(self, space: Space) -> None:
        """Fill this space, too. Call it in a `hold`."""
        self.spaces.append(space)
        if space.pid:
            self._by_pid[space.pid] = space

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """No thread copies within the `with`."""
        self._held = True
        self._open.clear()
        for lock in self._locks:
            lock.acquire()
        try:
            yield
        finally:
            self._held = False
            for lock in self._locks:
                lock.release()
            self._open.set()
            self._work.set()

    def asked(self) -> None:
        """Record that a page fault was served: others may follow, so copies are kept short."""
        self._bursts.asked(time.monotonic())

    def stop(self) -> None:
        """End the threads. Not in a `hold`."""
        self._stopped = True
        self._open.set()
        self._work.set()
        for thread in self._threads:
            if thread.ident:
                thread.join()
        os.close(self.told_fd)

    def _serve(self, lock: threading.Lock) -> None:
        priority.be_nice(NICE)
        while not self._stopped:
            self._work.wait()
            self._open.wait()
            try:
                with lock:
                    if self._stands_aside(lock):
                        pause_s = ASIDE_S
                    else:
                        pause_s = 0.0 if self._held or self._stopped else self._step()
            except Exception as error:  # noqa: BLE001 - the owner raises it
                self.error = self.error or error
                os.eventfd_write(self.told_fd, 1)
                return
            if pause_s:
                time.sleep(pause_s)
            elif self._is_asked():
                # A process that has just woken would wait for the next tick, however high our nice
                # value.
                os.sched_yield()

    def _stands_aside(self, lock: threading.Lock) -> bool:
        """Whether this thread must pause. The working set never pauses: it prevents page faults."""
        goes_on = lock is self._locks[0]
        return not self._first and self._bursts.stands_aside(time.monotonic(), goes_on=goes_on)

    def _step(self) -> float:
        """Do a piece of work. Returns the seconds to wait before the next piece."""
        is_early = self._is_early
        with self._mutex:
            found = self._next_ready() if is_early else self._next()
            if not found and not is_early:
                self._work.clear()
                os.eventfd_write(self.told_fd, 1)
                return 0.0
        return self._fill(*found) if found else self._look_ahead()

    def _look_ahead(self) -> float:
        content = next(self._ahead, None)
        if not content:
            return _LOOK_S
        payload, offset, size = content
        payload.prepare(offset, size)
        return 0.0

    def _fill(self, space: Space, extent: Extent) -> float:
        rest, pause_s = [extent], _CHANGING_S
        try:
            rest = space.fill(extent)
            self._refused_since = 0.0
        except Gone:
            space.is_gone, rest = True, []
        except OSError as error:
            self.refused(error)
            pause_s = _REFUSED_S
        finally:
            with self._mutex:
                space.missing.put(rest)
        return pause_s if rest else 0.0

    def refused(self, error: OSError) -> None:
        """Note that the kernel refused a page. Raises Stuck when this goes on for too long."""
        now = time.monotonic()
        self._refused_since = self._refused_since or now
        if now - self._refused_since > _NO_MEMORY_S:
            raise Stuck(
                f"the kernel refused pages for {_NO_MEMORY_S:.0f} s: {error.strerror}"
            ) from error

    def _is_asked(self) -> bool:
        return not self._first and self._bursts.is_lately(time.monotonic())

    def _next(self) -> tuple[Space, Extent] | None:
        while self._first:
            if found := self._next_first():
                return found
        size = ASKED_BYTES if self._is_asked() else PIECE_BYTES
        for space in self.spaces:
            if not space.is_over and (extent := space.next_piece(size)):
                return space, extent
        return None

    def _next_ready(self) -> tuple[Space, Extent] | None:
        """Returns the next range of the working set that lies in an area which CRIU has made ready.

        CRIU moves an area to its place and registers it there, area by area.
        """
        for _ in range(min(_LOOKS, len(self._first)) if self.spaces else 0):
            pid, start, end = self._first[0]
            space = self._by_pid.get(pid)
            if space and space.is_ready(start, end):
                return self._next_first()
            self._first.rotate(-1)
        return None

    def _next_first(self) -> tuple[Space, Extent] | None:
        pid, start, end = self._first.popleft()
        space = self._by_pid.get(pid)
        if not space or space.is_gone or not (taken := space.missing.take(start, end)):
            return None
        space.missing.put(taken[1:])
        if taken[1:]:
            self._first.appendleft((pid, taken[1][0], end))
        return space, taken[0]
