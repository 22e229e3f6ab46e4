"""Measures how long the event loop is busy at once, and how much memory the daemon has had.

A step is all code that runs between two waits of the loop: during a step, no pod gets an answer.
Measuring costs two readings of clocks for each step. A step's wall time includes the time that
other processes of a busy node took; its processor time does not, and is the daemon's own fault.
"""

from __future__ import annotations

import asyncio
import logging
import selectors
import time
from typing import TYPE_CHECKING, Any, Final

from shim.kernel import procfs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

log = logging.getLogger("quickthawd")

SLOW_S: Final = 0.05
"""In seconds of processor time. No pod may bring about a step that takes longer."""


class SlowSteps:
    """Keeps the greatest step so far, by wall time and by processor time; counts slow steps."""

    def __init__(self) -> None:
        self.steps = self.slow = 0
        self.wall_s = self.cpu_s = 0.0

    def step(self, wall_s: float, cpu_s: float) -> None:
        """Count a step that has ended."""
        self.steps += 1
        self.wall_s = max(self.wall_s, wall_s)
        self.cpu_s = max(self.cpu_s, cpu_s)
        if cpu_s > SLOW_S:
            self.slow += 1
            log.warning(
                "the event loop was busy for %.3f s in a single step (processor time %.3f s)",
                cpu_s,
                wall_s,
            )

    def as_json(self) -> dict[str, Any]:
        """Returns the figures for `quickthaw status`."""
        return {
            "steps": self.steps, "slow_steps": self.slow,
            "greatest_step_s": round(self.wall_s, 4),
            "greatest_step_cpu_s": round(self.cpu_s, 4),
        }  # fmt: skip


class _Selector(selectors.DefaultSelector):
    """A selector that notices when the loop comes back to wait."""

    def __init__(self, watch: SlowSteps) -> None:
        super().__init__()
        self._watch = watch
        self._wall_s = self._cpu_s = 0.0

    def select(self, timeout: float | None = None) -> Any:
        """Select as the base class does, and measure the step before."""
        if self._wall_s:
            self._watch.step(
                time.perf_counter() - self._wall_s, time.thread_time() - self._cpu_s
            )  # fmt: skip
        found = super().select(timeout)
        self._wall_s, self._cpu_s = time.perf_counter(), time.thread_time()
        return found


def watched(watch: SlowSteps) -> asyncio.AbstractEventLoop:
    """Returns a new event loop whose steps `watch` counts."""
    return asyncio.SelectorEventLoop(_Selector(watch))


def memory() -> Mapping[str, int]:
    """Returns the daemon's memory in bytes, now and at its peak. Source: proc_pid_status(5).

    peak_bytes is since the start; both figures include memory shared with other processes.
    """
    found = procfs.memory("self")
    return {"bytes": found["VmRSS"], "peak_bytes": found["VmHWM"]}


def gauges(watch: SlowSteps) -> Sequence[tuple[str, str, Callable[[], float]]]:
    """Returns name, description and value of each figure of the daemon's own, for the metrics."""
    return (
        ("loop_greatest_step_seconds", "Longest time that the event loop was busy at once.",
         lambda: watch.wall_s),
        ("loop_greatest_step_cpu_seconds", "The same in processor time.", lambda: watch.cpu_s),
        ("daemon_peak_memory_bytes", "Memory of the daemon at most, since its start.",
         lambda: memory()["peak_bytes"]),
    )  # fmt: skip
