"""Ends the work of a thread: at a deadline, or when another thread asks for that. Lean.

A thread cannot be cancelled. Each loop over something that may be long asks between two steps.
"""

from __future__ import annotations

import contextlib
import math
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_LOOK_S = 0.1
"""`tell` does not wake a sleeping thread, which polls: an event would import threading."""


class Stopped(Exception):
    """The work was given up: the deadline has passed, or nobody waits for the work any more."""


class Stop:
    """until: the deadline on `time.monotonic`. Any thread may call `tell`."""

    __slots__ = ("_told", "_why", "until")

    def __init__(self, until: float = math.inf) -> None:
        self.until, self._told, self._why = until, False, "it is past its deadline"

    def tell(self) -> None:
        """End the work at the next step. Idempotent."""
        self._told = True

    def check(self) -> None:
        """Raises Stopped when the work is to end."""
        if self._told:
            raise Stopped("somebody stopped the work")
        if time.monotonic() > self.until:
            raise Stopped(self._why)

    @contextlib.contextmanager
    def sooner(self, until: float, why: str) -> Iterator[None]:
        """End the work of the `with` at `until` already, if that is earlier. why: said then."""
        before = self.until, self._why
        if until < self.until:
            self.until, self._why = until, why
        try:
            yield
        finally:
            self.until, self._why = before

    def sleep(self, seconds: float) -> None:
        """Sleep, but not beyond the end. Raises Stopped."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, _LOOK_S))
