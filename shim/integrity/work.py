"""Runs hashing jobs on a few threads, beside the caller's other work. Lean.

Threads, because reading and hashing leave the GIL free. The threads start, and `threading` is
imported, only when there is much to do.
"""

from __future__ import annotations

import os
import time
from functools import partial

from shim.kernel.process import TooLate

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable

THREADS = min(4, os.cpu_count() or 1)


class _Stopped(Exception):
    """Nobody waits for the result any more."""


def run(jobs: Iterable[Callable[[], None]]) -> None:
    """Run all jobs on threads. Raises the first error of a job, after all threads have ended."""
    work = Work(float("inf"))
    for job in jobs:
        work.add(partial(_unless_stopped, work, job))
    if work.is_due:
        try:
            work.start()
            work.finish()
        finally:
            work.stop()  # before the caller closes the files that the threads use


def _unless_stopped(work: Work, job: Callable[[], None]) -> None:
    work.tick()
    job()


class Work:
    """Jobs that may add jobs; the first error ends all of them. until: on `time.monotonic`."""

    def __init__(self, until: float) -> None:
        self._until = until
        self._jobs: list[Callable[[], None]] = []
        self._threads: list[threading.Thread] = []
        self._changed: threading.Condition | None = None
        self._busy = 0
        self._error: BaseException | None = None
        self._stopped = False

    @property
    def is_due(self) -> bool:
        """Whether jobs wait and no thread has started."""
        return bool(self._jobs) and self._changed is None

    def again(self) -> Work:
        """Returns a new Work with the same deadline."""
        return Work(self._until)

    def add(self, job: Callable[[], None]) -> None:
        """Add a job. Jobs of a started Work may add others."""
        if self._changed is None:
            self._jobs.append(job)
            return
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()

    def start(self) -> None:
        """Work on threads from now on. Without them `finish` runs the jobs itself."""
        import threading

        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._serve, name=f"hash {number}", daemon=True)
            for number in range(THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def tick(self) -> None:
        """Jobs call this now and then. Raises to end a job: too late, or nobody waits any more."""
        if self._stopped:
            raise _Stopped
        if time.monotonic() > self._until:
            raise TooLate("hashing the snapshot took too long")

    def finish(self) -> None:
        """Wait until all jobs are done. Raises the first error of a job."""
        if self._changed is None:
            while self._jobs:
                self._jobs.pop(0)()
        for thread in self._threads:
            thread.join()
        self._threads = []
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Abandon unfinished jobs. Idempotent; after `finish` there are none."""
        self._stopped = True
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _serve(self) -> None:
        while (job := self._next()) is not None:
            try:
                job()
            except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
                self._fail(error)
            self._done()

    def _next(self) -> Callable[[], None] | None:
        assert self._changed is not None  # noqa: S101 - it was started
        with self._changed:
            while not self._jobs and self._busy and not self._error:
                self._changed.wait()
            if self._error or not self._jobs:
                return None
            self._busy += 1
            return self._jobs.pop(0)

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self._stopped = True

    def _done(self) -> None:
        assert self._changed is not None  # noqa: S101 - it was started
        with self._changed:
            self._busy -= 1
            self._changed.notify_all()
