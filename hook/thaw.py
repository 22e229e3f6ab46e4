"""thaw: the guard of a container that is frozen for its capture.

Not a hook of the runtime: quickthawd starts it before it freezes, because a daemon that is killed,
stopped or hangs cannot thaw, and the container serves somebody. It waits on its standard input
for the word that the window is over; before that, `within S` gives it another time from then on.
When the word does not come (the daemon has ended, is stopped, or the time is up), it thaws, and
says so with its exit status.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time

from shim.contract import journal
from shim.contract.paths import CONTAINERS
from shim.contract.words import GUARD_DONE, GUARD_READY, GUARD_WITHIN
from shim.kernel import procfs
from shim.kernel.cgroup import Freezer

ABANDONED = 3
"""Exit status: it had to thaw."""
_MOST_BYTES = 256
_LOOK_S = 0.2
_STOPPED_LOOKS = 5
"""A daemon that a debugger or a person stops for less than that is waited for."""


def thaw(container: str, freezer: str, within_s: float) -> int:
    """Guard `container`, whose cgroup has the freezer at path `freezer`. Returns an exit status.

    A checkpoint that goes on without its daemon ends with putting the freezer back as it found
    it: thawed before that alone, the container would stay frozen. Raises OSError.
    """
    private = f"{CONTAINERS}/{container}"
    until = time.monotonic() + within_s
    with journal.lock(private, journal.THAW):
        sys.stdout.buffer.write(GUARD_READY)
        sys.stdout.buffer.flush()
        told, until = _told(until)
        if told:
            return 0
        while journal.is_locked(private, journal.CHECKPOINT):
            if time.monotonic() > until:
                _thaw(freezer)
            time.sleep(_LOOK_S)
        _thaw(freezer)
    return ABANDONED


def _told(until: float) -> tuple[bool, float]:
    """Wait for the word. Returns whether it came, and the time that counts."""
    daemon, stopped = os.getppid(), 0
    while time.monotonic() < until and stopped < _STOPPED_LOOKS:
        if not select.select([0], [], [], _LOOK_S)[0]:
            stopped = stopped + 1 if _is_stopped(daemon) else 0
            continue
        lines = os.read(0, _MOST_BYTES).splitlines(keepends=True)
        for line in lines:
            if not line.startswith(GUARD_WITHIN):
                return line == GUARD_DONE, until
            until = time.monotonic() + float(line.removeprefix(GUARD_WITHIN))
        if not lines:
            return False, until
    return False, until


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return procfs.state(pid) == "T"
    return False


def _thaw(freezer: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # the container has ended
        Freezer(freezer).thaw()
