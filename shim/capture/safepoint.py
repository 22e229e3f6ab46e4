"""Stops a CRIU that must be killed at a safe point: no process executes CRIU's code there.

CRIU has a process execute system calls and a blob of its own, each followed by a breakpoint. If
CRIU ends before the process is at its breakpoint, or before the process has its registers back, the
breakpoint ends the process: SIGTRAP without a tracer. Meanwhile CRIU blocks all signals of the
thread but SIGTRAP, and the thread runs or is in a ptrace stop. The daemon of the blob is safe: it
sleeps in a system call, and leaves when CRIU's socket is closed.
Source: CRIU, compel/src/lib/infect.c, parasite_run and parasite_trap.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING

from shim.kernel import lineage, procfs
from shim.kernel.fds import OwnedFd

if TYPE_CHECKING:
    from collections.abc import Iterable

_WITHIN_S = 0.5
_STANDS_WITHIN_S = 0.1
_LOOK_S = 0.001
_NOT_BLOCKED = {signal.SIGTRAP, signal.SIGKILL, signal.SIGSTOP}
_BLOCKED = f"{sum(1 << (number - 1) for number in range(1, 65) if number not in _NOT_BLOCKED):016x}"
"""SigBlk of proc_pid_status(5), as CRIU's ptrace(PTRACE_SETSIGMASK) leaves it."""


def stop(runtime: int, pids: Iterable[int]) -> bool:
    """Stop the descendants of `runtime` at a safe point of `pids`, for SIGKILL to follow.

    Returns False when there is none within half a second: they are stopped all the same. The kernel
    reports no such moment: hence the polling.
    """
    until = time.monotonic() + _WITHIN_S
    while True:
        crius = lineage.descendants(runtime)
        _signal(crius, signal.SIGSTOP)
        standing_until = time.monotonic() + _STANDS_WITHIN_S
        while not all(map(_stands, crius)) and time.monotonic() < standing_until:
            time.sleep(_LOOK_S)
        if is_safe(pids):
            return True
        if time.monotonic() > until:
            return False
        _signal(crius, signal.SIGCONT)
        time.sleep(_LOOK_S)


def is_safe(pids: Iterable[int], proc: str = "/proc") -> bool:
    """Returns whether no thread executes CRIU's code, or is in a ptrace stop in that code.

    Leaves out a process that has ended meanwhile.
    """
    for pid in pids:
        with contextlib.suppress(OSError):
            if any(_is_crius(f"{pid}/task/{each}", proc) for each in procfs.threads(pid, proc)):
                return False
    return True


def _is_crius(thread: str, proc: str) -> bool:
    with contextlib.suppress(OSError):
        fields = procfs.status(thread, proc)
        return fields["State"][0] in "tRD" and fields["SigBlk"] == _BLOCKED
    return False


def _stands(pid: int) -> bool:
    """Returns whether a process has been stopped, has ended, or hangs in the kernel."""
    with contextlib.suppress(OSError):
        return procfs.state(pid) in "TtZXD"
    return True


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError), OwnedFd(os.pidfd_open(pid)) as pidfd:
            signal.pidfd_send_signal(pidfd.fileno(), number)
