"""Finds the descent of processes, and their pids in PID namespaces. Lean."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def strangers(pids: Iterable[int], ancestor: int) -> list[int]:
    """Returns the `pids` that do not descend from `ancestor` through other `pids`.

    In a container's cgroup these are the processes of `exec`: their parent is outside. A process
    that has died meanwhile is left out. Source: proc_pid_status(5).
    """
    parents = {pid: parent for pid in pids if (parent := _parent(pid))}
    return [pid for pid in parents if not _descends(pid, ancestor, parents)]


def numbers(pid: int) -> list[int]:
    """Returns the pid of a process in each PID namespace, from /proc's own on. Raises OSError.

    Source: proc_pid_status(5), NSpid.
    """
    with open(f"/proc/{pid}/status", "rb") as file:
        for line in file:
            if line.startswith(b"NSpid:"):
                return [int(number) for number in line.split()[1:]]
    raise ProcessLookupError(f"process {pid} has no NSpid in its status")


def descendants(pid: int) -> list[int]:
    """Returns the descendants of process `pid`, as far as no process in between has ended.

    Source: proc_tid_children(5).
    """
    found: list[int] = []
    due = [pid]
    while due:
        each = due.pop()
        try:
            threads = os.listdir(f"/proc/{each}/task")
        except OSError:
            continue
        for thread in threads:
            try:
                with open(f"/proc/{each}/task/{thread}/children", "rb") as file:
                    children = [int(child) for child in file.read().split()]
            except OSError:
                continue
            found += children
            due += children
    return found


def _descends(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    for _ in range(len(parents) + 1):
        if pid == ancestor:
            return True
        if pid not in parents:
            return False
        pid = parents[pid]
    return False


def _parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            for line in file:
                if line.startswith(b"PPid:"):
                    return int(line.split()[1])
    except OSError:
        pass
    return 0


def tree(pid: int) -> Iterator[int]:
    """Yields the process and all its descendants. Raises OSError."""
    yield pid
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/children") as file:
            children = [int(child) for child in file.read().split()]
        for child in children:
            yield from tree(child)
