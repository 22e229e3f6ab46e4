"""The cost of a node's daemon, by the daemon's own account: for tests, `make faults`, `make soak`.

figures = Figures()
figures.take(node)      # repeatedly, and before the daemon ends
figures.as_json()
"""

import json
from dataclasses import dataclass
from typing import Any, Final

from shim.kernel import procfs
from tests.node.node import Node

QUICKTHAW: Final = "/usr/lib/quickthaw/bin/quickthaw"
SLOW_S: Final = 0.05


@dataclass(slots=True)
class Figures:
    """The greatest of all daemons that were looked at: a restart begins anew.

    step_s: the longest time that the event loop was busy at once. step_cpu_s: the same in its
    processor's time, which other processes of a busy machine do not lengthen. slow_steps: above
    SLOW_S of processor time. peak_bytes: memory.
    """

    step_s: float = 0.0
    step_cpu_s: float = 0.0
    slow_steps: int = 0
    peak_bytes: int = 0
    _of: int = 0
    _slow_before: int = 0

    def take(self, node: Node) -> "Figures":
        """Look now. Of a daemon that does not answer only the memory is known."""
        pid = node.daemon_pid
        if pid <= 0:
            return self
        self.peak_bytes = max(self.peak_bytes, peak_bytes(pid))
        told = node.call([QUICKTHAW, "status", "--json"])
        if told.returncode:
            return self
        loop: dict[str, Any] | None = json.loads(told.stdout)["daemon"].get("loop")
        if loop is None:
            return self  # the daemon is down: the command line answers instead
        if pid != self._of:
            self._of, self._slow_before = pid, self.slow_steps
        self.slow_steps = self._slow_before + int(loop["slow_steps"])
        self.step_s = max(self.step_s, loop["greatest_step_s"])
        self.step_cpu_s = max(self.step_cpu_s, loop["greatest_step_cpu_s"])
        return self

    def as_json(self) -> dict[str, float]:
        """Returns the figures for a file of results."""
        return {
            "greatest_step_s": self.step_s, "greatest_step_cpu_s": self.step_cpu_s,
            "slow_steps": self.slow_steps, "peak_memory_mib": round(self.peak_bytes / 2**20, 1),
        }  # fmt: skip

    def __str__(self) -> str:
        return (
            f"the daemon: event loop busy for {self.step_cpu_s * 1000:.0f} ms at most "
            f"({self.step_s * 1000:.0f} ms by the clock), {self.slow_steps} slow steps, "
            f"{self.peak_bytes / 2**20:.0f} MiB of memory at most"
        )


def peak_bytes(pid: int) -> int:
    """Returns VmHWM of a process, 0 when the process has ended."""
    try:
        return procfs.memory(pid).get("VmHWM", 0)
    except (FileNotFoundError, ProcessLookupError):
        return 0
