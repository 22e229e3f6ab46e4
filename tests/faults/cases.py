"""The matrix: every fault point with every action that makes sense there, and faults from outside.

Pure: `restoring`, `capturing` and `outside` run the cases.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from shim.contract.faults import ACTIONS, POINTS

RESTORED: Final = "restored"
COLD: Final = "cold"
KILLED: Final = "killed"
"""The first attempt failed; kubelet's next attempt started cold."""


@dataclass(frozen=True, slots=True)
class Case:
    """phase: the fault point, or where a fault from outside strikes. expected: right outcomes.

    beside: another point that has to fail first, with an error, to get there.
    """

    phase: str
    fault: str
    expected: tuple[str, ...]
    beside: str = ""

    @property
    def name(self) -> str:
        """Returns the name by which FAULTS= selects the case."""
        return f"{self.phase}/{self.fault}"

    @property
    def kind(self) -> str:
        """Returns `restore`, `memory`, `hook`, `daemon`, `capture`, `store` or `outside`."""
        return self.phase.partition(".")[0] if self.phase in POINTS else "outside"

    @property
    def ground(self) -> str:
        """Returns on what kind of container it can happen: `plain`, `driver` or `direct`, of the
        ways to carry device memory.
        """
        if ".gpu" in self.phase or self.phase.endswith("device memory"):
            return "direct"
        return "driver" if self.phase.endswith("CUDA driver") else "plain"

    @property
    def is_after_success(self) -> bool:
        """Returns whether the restored process runs when the fault strikes."""
        return self.phase in (*_AFTER_SUCCESS, "memory.filling", "memory.filled")

    def armed(self) -> list[dict[str, object]]:
        """Returns the content of the file that arms the fault."""
        armed: list[dict[str, object]] = []
        if self.phase in POINTS:
            armed.append({"point": self.phase, "action": self.fault})
        if self.beside:
            armed.append({"point": self.beside, "action": "error"})
        return armed


_AFTER_SUCCESS: Final = ("restore.outcome", "restore.outcome.written")
"""The container runs restored; only the report of the restore is lost."""
_NEEDS_FAILURE: Final = ("restore.undo", "restore.undone", "restore.cold")
_MEMORY: Final = {
    "memory.started": (COLD,), "memory.told": (COLD,), "memory.filling": (KILLED, COLD),
    "memory.filled": (RESTORED,),
}  # fmt: skip
_IN_RUNTIME: Final = ("restore.undo", "restore.undone", "restore.cold")


def _restore_outcomes(point: str, action: str) -> tuple[str, ...]:
    if action == "kill" or (action == "hang" and point in _IN_RUNTIME):
        return (KILLED,)
    if point == "restore.cold":
        return (KILLED,)
    return (RESTORED,) if point in _AFTER_SUCCESS else (COLD,)


def _of_restore() -> Iterator[Case]:
    for point in (each for each in POINTS if each.startswith("restore.")):
        beside = "restore.told" if point in _NEEDS_FAILURE else ""
        for action in ACTIONS:
            yield Case(point, action, _restore_outcomes(point, action), beside)


def _of_memory() -> Iterator[Case]:
    """Yields failures of the page server: a cold start before the processes run, then their end.

    Not during the filling of shared memory, of which this container has none: see
    tests/node/test_memory_shared.py.
    """
    for point in _MEMORY:
        for action in ACTIONS:
            yield Case(point, action, _MEMORY[point])


def _of_hook() -> Iterator[Case]:
    for action in ACTIONS:
        yield Case("hook.prestart", action, (COLD,))
        yield Case("hook.prestart.done", action, (COLD,))
    for point in ("hook.poststop", "hook.poststop.forgotten"):
        # A hook that hangs is killed by the runtime after 20 s: once is enough.
        for action in ("error", "kill", *(["hang"] if point == "hook.poststop" else [])):
            yield Case(point, action, (RESTORED,))


_DAEMON: Final = {
    "daemon.create": (COLD,),
    "daemon.create.prepared": (COLD,),
    "daemon.decide": (COLD,),
    "daemon.ticket": (COLD,),
    "daemon.ticket.written": (COLD, RESTORED),
    "daemon.started": (RESTORED,),
    "daemon.outcome.taken": (RESTORED,),
    "daemon.removed": (RESTORED,),
}


def _of_daemon() -> Iterator[Case]:
    for point, expected in _DAEMON.items():
        for action in ("error", "hang", "kill"):
            yield Case(point, action, expected)
    yield Case("daemon.create", "enospc", (COLD,))
    yield Case("daemon.ticket", "enospc", (COLD,))


_WRITES: Final = ("capture.precopied", "capture.memory.precopied", "capture.dumped",
                  "capture.memory.copied", "capture.rootfs.copied",
                  "capture.shm.copied", "store.staged", "store.digested",
                  "store.manifest.written", "store.synced")  # fmt: skip
"""Points of a capture after which something was, or is to be, written."""
_HANGS: Final = (
    "capture.quiesced",
    "capture.gpu.taken",
    "capture.gpu.checkpointed",
    "capture.frozen",
    "capture.shm.copied",
    "store.synced",
)
"""Points at which a hanging capture is of interest: before, in and after the frozen window."""


def _of_capture() -> Iterator[Case]:
    """Yields cases of a capture. The outcome is the start of the next pod when the fault is
    over.
    """
    for point in POINTS:
        if point.startswith(("capture.", "store.")) and not point.startswith("store.remove"):
            yield Case(point, "error", (RESTORED,))
            yield Case(point, "kill", (RESTORED,))
            if point in _WRITES:
                yield Case(point, "enospc", (RESTORED,))
            if point in _HANGS:
                yield Case(point, "hang", (RESTORED,))
    for point in (each for each in POINTS if each.startswith("store.remove")):
        for action in ("error", "kill"):
            yield Case(point, action, (RESTORED, COLD))


OUTSIDE: Final = {
    ("restore: CRIU", "killed"): (COLD,),
    ("restore: CRIU", "stopped"): (COLD,),
    ("restore: quickthaw-runc", "killed"): (KILLED,),
    ("restore: quickthaw-runc", "stopped"): (KILLED, COLD),
    ("restore: page server", "killed before the processes run"): (COLD,),
    ("restore: page server", "stopped before the processes run"): (COLD,),
    ("restore: page server", "killed while it fills"): (KILLED,),
    ("restore: page server", "stopped while it fills"): (KILLED,),
    ("restore: its guard", "killed"): (RESTORED,),
    ("restore: its guard", "stopped"): (RESTORED,),
    ("restore: memory", "bit flipped"): (KILLED, COLD),
    ("restore: restored process", "killed before resume"): (COLD,),
    ("restore: daemon", "killed between create and start"): (RESTORED,),
    ("restore: daemon", "killed during the swap"): (RESTORED, COLD),
    ("restore: daemon", "stopped before create"): (COLD,),
    ("restore: daemon", "stopped between create and start"): (RESTORED,),
    ("restore: containerd", "restarted during the swap"): (RESTORED, COLD, KILLED),
    ("restore: images", "truncated"): (COLD,),
    ("restore: images", "bit flipped"): (COLD,),
    ("restore: images", "a file removed"): (COLD,),
    ("restore: images", "removed while they are read"): (COLD, RESTORED),
    ("restore: manifest", "truncated"): (COLD,),
    ("restore: rootfs diff", "removed"): (COLD,),
    ("restore: /run/quickthaw", "full"): (COLD, RESTORED),
    ("restore: /dev/shm", "full"): (COLD,),
    ("restore: /dev/shm", "a name is taken"): (COLD,),
    ("restore: memory limit", "too small"): (COLD,),
    ("restore: mount", "its source is missing"): (KILLED, COLD),
    ("restore: network namespace", "gone"): (KILLED, COLD),
    ("restore: clock", "the snapshot is of the future"): (COLD,),
    ("restore: CUDA driver", "out of memory"): (COLD,),
    ("restore: CUDA driver", "refuses the devices"): (COLD,),
    ("restore: CUDA driver", "does not unlock"): (COLD,),
    ("restore: CUDA driver", "hangs"): (COLD,),
    ("restore: CUDA driver", "a process dies in it"): (COLD,),
    ("restore: CUDA driver", "its helper dies"): (RESTORED,),
    ("capture: CUDA driver", "the lock fails"): (RESTORED,),
    ("capture: CUDA driver", "the lock hangs"): (RESTORED,),
    ("capture: CUDA driver", "the checkpoint fails"): (RESTORED,),
    ("capture: CUDA driver", "the checkpoint hangs"): (RESTORED,),
    ("capture: CUDA driver", "its helper dies"): (RESTORED,),
    ("capture: CUDA driver", "does not give the source back"): (RESTORED,),
    ("capture: CUDA driver", "the source dies in it"): (RESTORED,),
    ("restore: device memory", "its loader dies"): (COLD,),
    ("restore: device memory", "its loader hangs"): (COLD,),
    ("restore: device memory", "the device is full"): (COLD,),
    ("restore: device memory", "the device refuses a copy"): (COLD,),
    ("restore: device memory", "bit flipped"): (COLD,),
    ("restore: device memory", "truncated"): (COLD,),
    ("restore: device memory", "a file removed"): (COLD,),
    ("capture: device memory", "its carrier dies"): (RESTORED,),
    ("capture: device memory", "its carrier hangs"): (RESTORED,),
    ("capture: device memory", "the device refuses a copy"): (RESTORED,),
    ("capture: device memory", "the store is full"): (RESTORED,),
    ("capture: device memory", "the socket of the library is gone"): (RESTORED,),
    ("capture: CRIU", "killed"): (RESTORED,),
    ("capture: CRIU", "stopped"): (RESTORED,),
    ("capture: daemon", "killed while CRIU dumps"): (RESTORED,),
    ("capture: daemon", "stopped while frozen"): (RESTORED,),
    ("capture: containerd", "restarted while CRIU dumps"): (RESTORED,),
    ("capture: store", "full"): (RESTORED,),
    ("capture: source", "killed while CRIU dumps"): (RESTORED,),
}
"""Faults from outside of quickthaw. A PID in use cannot be made: a container that quickthaw can
capture has a PID namespace of its own, and the new namespace is empty. The clock is the whole
machine's: the case changes the snapshot's time instead.
"""


def matrix() -> list[Case]:
    """Returns all cases, in their order."""
    outside = [Case(phase, fault, expected) for (phase, fault), expected in OUTSIDE.items()]
    return [*_of_restore(), *_of_memory(), *_of_hook(), *_of_daemon(), *_of_capture(), *outside]
