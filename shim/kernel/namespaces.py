"""Calls setns by descriptor (os has the call from Python 3.12 on). Lean.

The call changes the calling thread only. To enter a mount or user namespace, a process must have a
single thread.
"""

from __future__ import annotations

from shim.kernel.libc import call

CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWNET = 0x40000000


def setns(fd: int, kind: int = 0) -> None:
    """Enter the namespace `fd`. kind: the CLONE_NEW* kind that it must have, 0 for any.

    With a pidfd, `kind` selects namespaces of that process. Raises OSError. Source: setns(2).
    """
    call("setns", fd, kind)
