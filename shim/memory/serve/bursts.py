"""Decides when filling pauses because page faults come in bursts. Pure; times in seconds.

A request that touches ten missing pages faults ten times, one fault after the other. Between two
faults the processor is better left to the request: filling takes processor time, and the next fault
waits for the copy that is under way. But a process that walks through its memory faults without
end, 64 KiB at a time: there one thread goes on filling, which is faster.
"""

from __future__ import annotations

ASIDE_S = 0.001
"""Another fault often follows within this time; after it a burst is over."""
BURST_S = 0.003
"""Nothing is filled while a burst is younger than this."""
LATELY_S = 0.03
"""A process that faulted within this time may soon fault again: pieces are small, threads yield."""


class Bursts:
    """Records the page faults of a restore."""

    __slots__ = ("_began", "_last")

    def __init__(self) -> None:
        self._began = self._last = float("-inf")

    def asked(self, now: float) -> None:
        """Record that a page fault was served."""
        if now - self._last > ASIDE_S:
            self._began = now
        self._last = now

    def is_lately(self, now: float) -> bool:
        """Whether a page fault was served a short time ago."""
        return now - self._last < LATELY_S

    def stands_aside(self, now: float, *, goes_on: bool) -> bool:
        """Whether a thread must pause now. goes_on: this thread fills during long bursts."""
        if now - self._last > ASIDE_S:
            return False
        return not goes_on or now - self._began < BURST_S
