"""How long the event loop was busy at once, and how much memory the daemon has had.

A step is all that runs between two waits of the loop: while one goes on, no pod gets an answer. It
costs two readings of clocks for each. The wall time of a step has in it what other processes of a
busy node took; its processor time has not, and is what the daemon itself is to blame for.
"""

from __future__ import annotations

import asyncio
import logging
import selectors
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

log = logging.getLogger("quickthawd")

SLOW_S: Final = 0.05
"""Of processor time. No pod may bring a step that takes longer."""


class Watch:
    """The greatest step so far, by wall time and by processor time; how many were slow."""

    def __init__(self) -> None:
        self.steps = self.slow = 0
        self.wall_s = self.cpu_s = 0.0

    def step(self, wall_s: float, cpu_s: float) -> None:
        """One more has ended."""
        self.steps += 1
        self.wall_s = max(self.wall_s, wall_s)
        self.cpu_s = max(self.cpu_s, cpu_s)
        if cpu_s > SLOW_S:
            self.slow += 1
            log.warning("the event loop was busy for %.3f s at once (%.3f s)", cpu_s, wall_s)

    def as_json(self) -> dict[str, Any]:
        """For `quickthaw status`."""
        return {
            "steps": self.steps, "slow_steps": self.slow,
            "greatest_step_s": round(self.wall_s, 4),
            "greatest_step_cpu_s": round(self.cpu_s, 4),
        }  # fmt: skip


class _Selector(selectors.DefaultSelector):
    """Knows when the loop comes back to wait."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch
        self._wall_s = self._cpu_s = 0.0

    def select(self, timeout: float | None = None) -> Any:
        """As the selector's own."""
        if self._wall_s:
            self._watch.step(
                time.perf_counter() - self._wall_s, time.thread_time() - self._cpu_s
            )  # fmt: skip
        found = super().select(timeout)
        self._wall_s, self._cpu_s = time.perf_counter(), time.thread_time()
        return found


def watched(watch: Watch) -> asyncio.AbstractEventLoop:
    """A new event loop whose steps `watch` is told of."""
    return asyncio.SelectorEventLoop(_Selector(watch))


def memory() -> Mapping[str, int]:
    """Bytes that the daemon has in memory now, and that it had at most. Source: proc_pid_status(5).

    peak_bytes is since the start; both count what it shares with others.
    """
    rows = dict(
        row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines() if row
    )
    return {
        name: int(rows[field].split()[0]) * 1024
        for name, field in (("bytes", "VmRSS"), ("peak_bytes", "VmHWM"))
    }
