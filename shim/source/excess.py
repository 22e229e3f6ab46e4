"""Refuses captured processes with more power than their container's spec gives.

The gate compares specs, but CRIU restores the power of processes. If a process got more than its
spec says (a debugging container that shares the PID namespace leaves a child behind, an
administrator runs something with `nsenter`), the snapshot would hand that on. So this module looks
at every thread while everything is frozen. Sources: proc_pid_status(5), namespaces(7).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from shim.contract.errors import NotCapturable
from shim.kernel import procfs
from shim.kernel.capabilities import mask_of, names_of
from shim.kernel.lineage import tree

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from shim.oci.spec import Spec
    from shim.source.source import Source

_CAPABILITY_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
_ENDED = "ZX"
_FILTERED = "2"
"""The mode of seccomp with filters."""


def check(source: Source, pids: Iterable[int]) -> None:
    """Raises NotCapturable with the first process that has more than the spec gives.

    pids: the processes in the container's cgroup. Call this while they are frozen.
    """
    if why := excess(source.spec, source.pid, set(pids)):
        raise NotCapturable(
            "cannot capture", about=source.container, why=why,
            do="A snapshot would give a new pod more than it asks for: start the pod again.",
        )  # fmt: skip


def permitted(pids: Iterable[int], proc: str = "/proc") -> int:
    """Returns the union of the processes' permitted capabilities, as a mask. Raises OSError."""
    held = 0
    for pid in pids:
        held |= int(procfs.status(pid, proc)["CapPrm"], 16)
    return held


def excess(spec: Spec, init_pid: int, pids: set[int], proc: str = "/proc") -> str:
    """Returns the first excess of a process beyond the spec; empty if there is none.

    Raises OSError for a process that is gone: none can be gone while they are frozen.
    """
    for pid in sorted(set(tree(init_pid, proc)) - pids):
        if procfs.status(pid, proc)["State"][0] not in _ENDED:  # no cgroup lists a zombie
            return f"process {pid} of its tree is in another cgroup"
    own = _places(init_pid, proc)
    for pid in sorted(pids):
        for thread in procfs.threads(pid, proc):
            task = f"{pid}/task/{thread}"
            if why := _more(spec, procfs.status(task, proc)) or _elsewhere(own, f"{proc}/{task}"):
                return f"process {pid} {why}"
    return ""


def _more(spec: Spec, status: Mapping[str, str]) -> str:
    """Returns the power of a thread that the spec does not give."""
    process = spec.process
    given = mask_of(spec.capabilities.get("bounding") or ())
    has = 0
    for name in _CAPABILITY_SETS:
        has |= int(status[name], 16)
    if process.get("capabilities") is not None and has & ~given:
        return f"has {', '.join(names_of(has & ~given))}, which its spec does not give"
    if process.get("noNewPrivileges") and status["NoNewPrivs"] != "1":
        return "can gain privileges, which its spec forbids"
    if spec.linux.get("seccomp") and status["Seccomp"] != _FILTERED:
        return "has no system call filter, and its spec has one"
    return ""


def _elsewhere(own: Mapping[str, str], task: str) -> str:
    """Returns how a thread's namespaces, root or label differ from the container init's."""
    for name, place in _seen(task).items():
        if place != own.get(name):
            return f"has another {name} than its container"
    return ""


def _places(pid: int, proc: str) -> dict[str, str]:
    return _seen(f"{proc}/{pid}/task/{pid}")


def _seen(task: str) -> dict[str, str]:
    found = {
        f"{name} namespace": os.readlink(f"{task}/ns/{name}")
        for name in _NAMESPACES
        if os.path.lexists(f"{task}/ns/{name}")
    }
    try:
        with open(f"{task}/attr/current", errors="surrogateescape", newline="\n") as file:
            found["security label"] = file.read().rstrip("\n\0")
    except OSError:
        pass  # this kernel has no security module with labels
    return found
