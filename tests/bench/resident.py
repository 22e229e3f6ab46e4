"""Measures when a container's memory is there: samples from outside, without stopping processes.

/proc/PID/statm needs no walk of page tables (smaps_rollup of 4 GiB takes 20 ms and the lock that
page faults want). Private memory is statm's resident less shared; shared memory is counted by the
blocks of its objects, mapped or not. A page of zeros that is mapped to the kernel's shared zero
page is no memory and is not counted.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from shim.kernel import procfs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PAGE: Final = os.sysconf("SC_PAGE_SIZE")
EVERY_S: Final = 0.004
STILL_S: Final = 0.7
"""Memory that does not grow for this long has its size."""
STILL_WITHIN_S: Final = 120.0
ALL: Final = 0.995
NAMESPACES_OF_A_CONTAINER: Final = 3  # host, node, container
SHARED: Final = ("/memfd:", "/dev/shm/", "/dev/zero (deleted)", "/SYSV", "/anon_hugepage")


@dataclass(frozen=True, slots=True)
class Level:
    """An amount of memory at a time, by time.perf_counter()."""

    at_s: float
    bytes: int


@dataclass(frozen=True, slots=True)
class Filled:
    """The growth of a container's memory.

    bytes: the amount in the end. resident_s: seconds from the call until (nearly) all was there.
    bytes_per_s: from the first twentieth to the last.
    """

    bytes: int
    resident_s: float
    bytes_per_s: float


def filled(levels: Sequence[Level], called_s: float) -> Filled:
    """Returns the growth that samples show. Raises ValueError when there are none."""
    if not levels:
        raise ValueError("no process of the container was seen")
    end = levels[-1].bytes
    begun, nearly, done = (_reached(levels, part * end) for part in (0.05, 0.95, ALL))
    took = max(nearly.at_s - begun.at_s, EVERY_S)
    rate = max(nearly.bytes - begun.bytes, 0) / took
    return Filled(end, done.at_s - called_s, rate)


def _reached(levels: Sequence[Level], wanted: float) -> Level:
    return next(level for level in levels if level.bytes >= wanted)


class Sampler:
    """Samples in a thread: `with Sampler(cgroups) as sampler`, then `sampler.settled()`.

    cgroups: returns the directories of the containers' cgroups that exist now.
    """

    def __init__(self, cgroups: Callable[[], Sequence[Path]], *, shared: bool = False) -> None:
        self.levels: list[Level] = []
        self._cgroups, self._shared = cgroups, shared
        self._inside: dict[int, bool] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def settled(self) -> None:
        """Wait until nothing grows any more. Raises TimeoutError."""
        until = time.monotonic() + STILL_WITHIN_S
        while time.monotonic() < until:
            since = time.perf_counter() - STILL_S
            recent = [level.bytes for level in list(self.levels) if level.at_s >= since]
            older = bool(self.levels) and self.levels[0].at_s < since
            if older and recent and recent[-1] <= recent[0] * 1.001 and recent[-1]:
                return
            time.sleep(0.05)
        raise TimeoutError("the container's memory still grows after {STILL_WITHIN_S:g} s")

    def _run(self) -> None:
        while not self._end.wait(EVERY_S):
            level = self.level()
            if level:
                self.levels.append(Level(time.perf_counter(), level))

    def level(self) -> int:
        """Returns the bytes that are there now."""
        pids = [pid for cgroup in self._cgroups() for pid in self._pids(cgroup)]
        shared = shared_bytes(pids) if self._shared else 0
        return sum(map(private_bytes, pids)) + shared

    def _pids(self, cgroup: Path) -> list[int]:
        try:
            listed = [int(line) for line in (cgroup / "cgroup.procs").read_text().split()]
        except OSError:
            return []
        return [pid for pid in listed if self._is_inside(pid)]

    def _is_inside(self, pid: int) -> bool:
        """Whether a process is the container's own. Helpers may be in the same cgroup."""
        if pid not in self._inside:
            try:
                self._inside[pid] = len(procfs.numbers(pid)) >= NAMESPACES_OF_A_CONTAINER
            except OSError:
                return False
        return self._inside[pid]


def private_bytes(pid: int) -> int:
    """Returns the private bytes of a process, 0 when it has ended. Source: proc_pid_statm(5)."""
    try:
        _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * PAGE


def shared_bytes(pids: Sequence[int]) -> int:
    """Returns the bytes of every shared object that a process has mapped, each counted once."""
    found: dict[tuple[int, int], int] = {}
    for pid in pids:
        try:
            for name in procfs.map_files(pid):
                path = f"/proc/{pid}/map_files/{name}"
                if os.readlink(path).startswith(SHARED):
                    status = os.stat(path)
                    found[status.st_dev, status.st_ino] = status.st_blocks * 512
        except OSError:
            continue
    return sum(found.values())


def proportional_bytes(cgroups: Sequence[Path]) -> int:
    """Returns the Pss of all processes in the cgroups, of helpers from outside, too."""
    found = 0
    for cgroup in cgroups:
        try:
            pids = (cgroup / "cgroup.procs").read_text().split()
        except OSError:
            continue
        for pid in pids:
            with contextlib.suppress(OSError):
                found += procfs.rollup(pid)["Pss"]
    return found
