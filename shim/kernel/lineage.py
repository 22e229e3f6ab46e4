"""Finds the descent of processes. Lean."""

from __future__ import annotations

import contextlib

from shim.kernel import procfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def strangers(pids: Iterable[int], ancestor: int) -> list[int]:
    """Returns the `pids` that do not descend from `ancestor` through other `pids`.

    In a container's cgroup these are the processes of `exec`: their parent is outside. A process
    that has died meanwhile is left out. Source: proc_pid_stat(5).
    """
    parents = {pid: parent for pid in pids if (parent := _parent(pid))}
    return [pid for pid in parents if not _descends(pid, ancestor, parents)]


def descendants(pid: int) -> list[int]:
    """Returns the descendants of process `pid`, as far as no process in between has ended.

    Source: proc_tid_children(5).
    """
    found: list[int] = []
    due = [pid]
    while due:
        each = due.pop()
        with contextlib.suppress(OSError):
            children = living_children(each)
            found += children
            due += children
    return found


def living_children(pid: int, proc: str = procfs.PROC) -> list[int]:
    """Returns the children of the threads of a process that have not ended meanwhile.

    Raises OSError for other failures.
    """
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in procfs.threads(pid, proc):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found += procfs.of_thread(pid, thread, proc)
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
    with contextlib.suppress(OSError):
        return procfs.parent(pid)
    return 0


def tree(pid: int, proc: str = procfs.PROC) -> Iterator[int]:
    """Yields the process and all its descendants, as CRIU dumps them. Raises OSError."""
    yield pid
    for child in procfs.children(pid, proc):
        yield from tree(child, proc)
