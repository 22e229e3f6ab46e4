"""The threads that fill memory which nobody has asked for yet.

One begins while CRIU restores, which keeps one processor busy: it makes page tables for the content
and fills what is asked for first, as soon as CRIU has an area ready for it. All fill the rest when
the processes run.

They copy side by side. Whoever reads what the kernel tells about an address space must `hold` them
first: no copy is under way then, and what each thread had taken is filled or put back. They work
at a low priority: the workload goes first, and a fault goes before everything.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque

from shim.kernel import priority
from shim.kernel.userfault import Gone
from shim.memory.bursts import ASIDE_S, Bursts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from shim.memory.extents import Extent
    from shim.memory.payload import Payload
    from shim.memory.space import Space

PIECE_BYTES = 2 << 20
"""Copied at once. A fault waits for a copy that is under way: half a millisecond."""
ASKED_BYTES = 256 << 10
"""The same while faults come: many small copies take longer, and nobody waits for one of them."""
NICE = 10
THREADS = min(4, os.cpu_count() or 1)
_LOOK_S = 0.001
_LOOKS = 16
"""At so many places for an area that is ready, before something else is done."""
_CHANGING_S = 0.0005
_REFUSED_S = 0.05
_NO_MEMORY_S = 10.0
"""How long pages may be refused by the kernel, as at the container's memory limit."""


class Stuck(Exception):
    """Memory could not be filled for too long."""


class Filling:
    """spaces: see `add`. error: what ended a thread."""

    def __init__(self, threads: int = THREADS) -> None:
        self.error: Exception | None = None
        self.told_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Readable when there is nothing to do any more, or an error."""
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
        """Begin on one thread, while CRIU restores.

        first: pid, first address and end of what is filled before all else, in about this order.
        ahead: payload, offset and size of what is needed soon.
        """
        self._first, self._ahead = deque(first), iter(ahead)
        self._open.set()
        self._work.set()
        self._threads[0].start()

    def start(self) -> None:
        """All areas are ready and the processes are about to run: fill everything."""
        self._is_early = False
        for thread in self._threads[1:]:
            thread.start()

    def add(self, space: Space) -> None:
        """Fill this one, too. In a `hold`."""
        self.spaces.append(space)
        if space.pid:
            self._by_pid[space.pid] = space

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Nothing is copied by a thread in the `with`."""
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
        """A fault was served, and others may follow: be short."""
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
                # Whoever has just woken would wait for the next tick, however nice we are.
                os.sched_yield()

    def _stands_aside(self, lock: threading.Lock) -> bool:
        """What is asked for first spares faults: nobody waits before that is there."""
        goes_on = lock is self._locks[0]
        return not self._first and self._bursts.stands_aside(time.monotonic(), goes_on=goes_on)

    def _step(self) -> float:
        """Do one piece of work. Returns how long to wait before the next one."""
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
        """The kernel did not take a page. Raises Stuck when that goes on for too long."""
        now = time.monotonic()
        self._refused_since = self._refused_since or now
        if now - self._refused_since > _NO_MEMORY_S:
            raise Stuck(f"the kernel does not take a page: {error.strerror}") from error

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
        """CRIU moves one area after the other to its place and registers it there."""
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
