"""Refuses a source that has a stopped or traced thread, or leftover code of CRIU.

CRIU attaches to every thread with ptrace. A traced thread has its tracer already. A stopped thread
does not take part while the freezer holds it: CRIU would wait in the kernel, where no signal ends
the wait, and the source would stand still. Sources: proc_pid_status(5), ptrace(2), wait_on_bit in
ptrace_attach of kernel/ptrace.c.

A CRIU that was killed while its code was in a process leaves the code mapped there. The process
goes on, and a snapshot of the process would have that code.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from shim.contract.errors import NotCapturable
from shim.kernel import procfs

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from shim.source.source import Source

_MAX_NAMED = 5
_CRIUS_CODE = b"/memfd:CRIUMFD"
_STATES = {"T": "is stopped", "t": "is stopped by its tracer"}


def check(source: Source, pids: Collection[int]) -> None:
    """Raises NotCapturable with the names of such processes."""
    if found := obstacles(pids):
        some = "; ".join(found[:_MAX_NAMED])
        more = f" and {len(found) - _MAX_NAMED} more" if len(found) > _MAX_NAMED else ""
        raise NotCapturable(
            "cannot capture", about=source.container, why=f"{some}{more}",
            do="Continue it (SIGCONT) or detach its tracer: then the next pod like it is captured.",
        )  # fmt: skip
    if left := [pid for pid in pids if _has_crius_code(pid)]:
        raise NotCapturable(
            "cannot capture", about=source.container,
            why=f"process {left[0]} of the node has code of CRIU mapped, which was killed in the "
            "middle of an earlier capture", do="Start the pod again.",
        )  # fmt: skip


def obstacles(pids: Iterable[int], proc: str = "/proc") -> list[str]:
    """Returns each process that has a stopped or traced thread, with its name and the reason.

    Leaves out a process that has ended meanwhile.
    """
    found = []
    for pid in sorted(pids):
        with contextlib.suppress(OSError):
            for thread in sorted(procfs.threads(pid, proc)):
                if why := _obstacle(f"{pid}/task/{thread}", proc):
                    found.append(why)
                    break
    return found


def _has_crius_code(pid: int) -> bool:
    try:
        return procfs.has_mapped(pid, _CRIUS_CODE)
    except OSError:
        return False


def _obstacle(task: str, proc: str) -> str:
    try:
        fields = procfs.status(task, proc)
    except OSError:
        return ""
    number = fields["NSpid"].split()[-1]
    named = f"process {number} ({_text(fields['Name'])})"
    if fields["TracerPid"] != "0":
        return f"{named} is traced by process {fields['TracerPid']} of the node"
    state = _STATES.get(fields["State"][:1], "")
    return f"{named} {state}" if state else ""


def _text(name: str) -> str:
    return os.fsencode(name).decode(errors="backslashreplace")
