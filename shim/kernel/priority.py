"""Changes how this process is scheduled, named and killed. Lean.

Sources: sched(7), ioprio_set(2), prctl(2).
"""

from __future__ import annotations

import contextlib
import os
import signal

from shim.kernel.libc import call, syscall

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_WHO_PROCESS, _CLASS_IDLE = 1, 3 << 13
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_EXPENDABLE = "500"


def become_idle() -> None:
    """Run and read only when processor and disk have nothing else to do. Raises OSError."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    if (number := _IOPRIO_SET.get(os.uname().machine)) is not None:
        syscall(number, _WHO_PROCESS, 0, _CLASS_IDLE)


def be_nice(value: int) -> None:
    """Set the niceness of this thread, and of threads that it starts later, if that is allowed."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, value)


def be_called(name: str) -> None:
    """Name this thread; 15 characters of the name are shown. Raises OSError."""
    call("prctl", _PR_SET_NAME, name.encode(), 0, 0, 0)


def protect(name: str) -> None:
    """Name this process `name` (15 characters are shown), and make it the OOM killer's last choice.

    Without CAP_SYS_RESOURCE the process stays in its place on the OOM killer's list. Raises
    OSError.
    """
    be_called(name)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("-999")


def be_a_helper_of(parent: int) -> None:
    """Have this process killed when `parent` ends, and before any pod when memory runs short.

    For helpers of the daemon: they inherit the daemon's place at the end of the OOM killer's list,
    and work on behalf of a pod's author. Raises OSError.
    """
    killed_with_parent(parent)
    be_expendable()


def be_expendable() -> None:
    """Make this process one of the first that the OOM killer takes. Raises OSError."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write(_EXPENDABLE)


def end_with_parent() -> None:
    """Have this process terminated (SIGTERM) when its parent ends. Raises OSError."""
    call("prctl", _PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def killed_with_parent(parent: int) -> None:
    """Have this process killed when `parent`, the process that started it, ends. Raises OSError."""
    call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
