"""Reads the host name of a UTS namespace by path. Lean."""

from __future__ import annotations

import os

from shim.kernel.fds import OwnedFd
from shim.kernel.namespaces import CLONE_NEWUTS, setns


def hostname_in(path: str) -> str:
    """Returns the host name in the namespace at `path`. Raises OSError.

    Only the calling thread enters: a process with an event loop or other threads must not do this.
    """
    with (
        OwnedFd(os.open("/proc/thread-self/ns/uts", os.O_RDONLY | os.O_CLOEXEC)) as here,
        OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as there,
    ):
        setns(there.fileno(), CLONE_NEWUTS)
        try:
            return os.uname().nodename
        finally:
            setns(here.fileno(), CLONE_NEWUTS)
