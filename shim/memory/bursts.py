"""Faults come in bursts: when they do, and what is not filled meanwhile. Pure; times in seconds.

A request that touches ten missing pages waits ten times, one after the other. Between two of them
the processor is better left to it: all that is filled meanwhile costs it something, and its next
fault waits for the copy that is under way. But a process that walks through its memory faults
without an end, and 64 KiB at a time: there the filling, which is faster, goes on on one thread.
"""

from __future__ import annotations

ASIDE_S = 0.001
"""A fault is often followed by another one within this time; after it a burst is over."""
BURST_S = 0.003
"""For so long nothing is filled beside a burst."""
LATELY_S = 0.03
"""Who has asked within this time may soon ask again: pieces are small, threads yield."""


class Bursts:
    """What is known of the faults of one restore."""

    __slots__ = ("_began", "_last")

    def __init__(self) -> None:
        self._began = self._last = float("-inf")

    def asked(self, now: float) -> None:
        """A fault was served."""
        if now - self._last > ASIDE_S:
            self._began = now
        self._last = now

    def is_lately(self, now: float) -> bool:
        """Whether faults have come a short time ago."""
        return now - self._last < LATELY_S

    def stands_aside(self, now: float, *, goes_on: bool) -> bool:
        """Whether a thread waits now. goes_on: it is the one that fills beside a long burst."""
        if now - self._last > ASIDE_S:
            return False
        return not goes_on or now - self._began < BURST_S
