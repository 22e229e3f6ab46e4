"""The threads that fill memory which nobody has asked for yet.

They copy side by side. Whoever reads what the kernel tells about an address space must `hold` them
first: no copy is under way then, and what each thread had taken is filled or put back. They work
at a low priority: the workload goes first, and a fault goes before everything.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time

from shim.kernel.userfault import Gone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from shim.memory.extents import Extent
    from shim.memory.space import Space

PIECE_BYTES = 1 << 20
"""Copied at once. A fault waits for a copy that is under way: a quarter of a millisecond."""
ASKED_BYTES = 128 << 10
"""The same while faults come: many small copies take longer, and nobody waits for one of them."""
_ASKED_S = 0.03
_ASIDE_S = 0.005
"""How long all threads but one stand aside then."""
NICE = 10
THREADS = min(4, os.cpu_count() or 1)
_CHANGING_S = 0.0005
_REFUSED_S = 0.05
_NO_MEMORY_S = 10.0
"""How long pages may be refused by the kernel, as at the container's memory limit."""


class Stuck(Exception):
    """Memory could not be filled for too long."""


class Filling:
    """spaces: changed by the owner, in a `hold`. error: what ended a thread."""

    def __init__(self, threads: int = THREADS) -> None:
        self.spaces: list[Space] = []
        self.error: Exception | None = None
        self.told_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Readable when there is nothing to do any more, or an error."""
        self._first: list[tuple[Space, int, int]] = []
        self._mutex = threading.Lock()
        self._held = self._stopped = False
        self._refused_since = self._asked_at = 0.0
        self._open, self._work = threading.Event(), threading.Event()
        self._locks = [threading.Lock() for _ in range(threads)]
        self._threads = [
            threading.Thread(target=self._serve, args=(lock,), daemon=True) for lock in self._locks
        ]

    def start(self, first: Iterable[tuple[Space, int, int]] = ()) -> None:
        """Begin. first: ranges of addresses that are filled before all others, in this order."""
        self._first = list(first)[::-1]
        self._open.set()
        self._work.set()
        for thread in self._threads:
            thread.start()

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
        self._asked_at = time.monotonic()

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
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while not self._stopped:
            self._work.wait()
            self._open.wait()
            try:
                with lock:
                    if self._is_asked() and not self._first and lock is not self._locks[0]:
                        pause_s = _ASIDE_S
                    else:
                        pause_s = 0.0 if self._held or self._stopped else self._step()
            except Exception as error:  # noqa: BLE001 - the owner raises it
                self.error = self.error or error
                os.eventfd_write(self.told_fd, 1)
                return
            if pause_s:
                time.sleep(pause_s)

    def _step(self) -> float:
        """Fill one piece. Returns how long to wait before the next one."""
        with self._mutex:
            found = self._next()
            if found is None:
                self._work.clear()
                os.eventfd_write(self.told_fd, 1)
                return 0.0
        space, extent = found
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
        return time.monotonic() - self._asked_at < _ASKED_S

    def _next(self) -> tuple[Space, Extent] | None:
        while self._first:
            space, start, end = self._first.pop()
            taken = [] if space.is_gone else space.missing.take(start, end)
            if taken:
                space.missing.put(taken[1:])
                if taken[1:]:
                    self._first.append((space, taken[1][0], end))
                return space, taken[0]
        size = ASKED_BYTES if self._is_asked() else PIECE_BYTES
        for space in self.spaces:
            if not space.is_over and (extent := space.next_piece(size)):
                return space, extent
        return None
