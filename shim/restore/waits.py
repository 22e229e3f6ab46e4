"""Finds out whether a late restore waits for a file system, and not for the snapshot. Lean.

CRIU and the runtime open files and mount directories of the pod's volumes. If the server of a
volume does not answer, they wait in the call. Two pods with such a volume must not take the
snapshot away from all others.
"""

from __future__ import annotations

import contextlib
import os

from shim.kernel import lineage, procfs, survivors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_CALLS = {
    2: "open", 4: "stat", 6: "lstat", 21: "access", 74: "fsync", 76: "truncate", 80: "chdir",
    82: "rename", 83: "mkdir", 84: "rmdir", 86: "link", 87: "unlink", 88: "symlink",
    89: "readlink", 90: "chmod", 92: "chown", 137: "statfs", 138: "fstatfs", 165: "mount",
    166: "umount2", 191: "getxattr", 192: "lgetxattr", 257: "openat", 258: "mkdirat",
    262: "newfstatat", 263: "unlinkat", 265: "linkat", 267: "readlinkat", 269: "faccessat",
    285: "fallocate", 332: "statx", 428: "open_tree", 429: "move_mount", 437: "openat2",
    439: "faccessat2", 442: "mount_setattr",
}  # fmt: skip
"""Calls that wait for nothing but a file system. Source: the kernel, syscall_64.tbl."""
_DISK = "D"


def on_file_system(container: str) -> str:
    """Returns which process of the restore waits for a file system, and how; empty if none does.

    Looks at this process's descendants, and at all in the container's cgroups. Reads only what the
    kernel has in memory.
    """
    pids = {*lineage.descendants(os.getpid()), *survivors.members(container)}
    return waiting(sorted(pids))


def waiting(pids: Iterable[int]) -> str:
    """Returns which of the processes waits for a file system, and how; empty if none does."""
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            for thread in procfs.threads(pid):
                if how := _waits(f"{pid}/task/{thread}"):
                    return f"process {pid} waits for a file system ({how})"
    return ""


def _waits(task: str) -> str:
    """Returns the call in which the thread waits; empty if it runs, or waits for something else.

    Source: proc_pid_syscall(5), proc_pid_stat(5). A page fault in a file is no call: a thread that
    no signal wakes.
    """
    try:
        with open(f"/proc/{task}/syscall") as file:
            first = file.read().split()[0]
        state = procfs.state(task)
    except (OSError, IndexError):
        return ""  # it has ended
    call = _CALLS.get(int(first)) if first.isdigit() else None
    return call or ("state D" if state == _DISK else "")
