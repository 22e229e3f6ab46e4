"""Calls setns and unshare by descriptor (os has them from Python 3.12 on). Lean.

Both change the calling thread only. Mount and user namespaces need a process with a single thread.
"""

from __future__ import annotations

import os

from shim.kernel.fds import OwnedFd
from shim.kernel.libc import call

CLONE_NEWTIME = 0x00000080
CLONE_FS = 0x00000200
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000


def setns(fd: int, kind: int = 0) -> None:
    """Enter the namespace `fd`. kind: the CLONE_NEW* kind that it must have, 0 for any.

    With a pidfd, `kind` selects namespaces of that process. Raises OSError. Source: setns(2).
    """
    call("setns", fd, kind)


def unshare(kinds: int) -> None:
    """Leave the namespaces named in `kinds` for new ones. Raises OSError. Source: unshare(2).

    CLONE_FS: no longer share the working directory and the root with the other threads.
    """
    call("unshare", kinds)


def open_namespace(pid: int, name: str) -> OwnedFd:
    """Returns a descriptor of a namespace of `pid`. name: as in /proc/PID/ns (`net`, `mnt`, …).

    Raises OSError. The caller makes sure that `pid` is still the intended process.
    """
    return OwnedFd(os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC))
