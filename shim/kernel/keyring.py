"""Session keyrings. Lean. Sources: keyctl(2), session-keyring(7)."""

from __future__ import annotations

import errno
import os

from shim.kernel.libc import syscall

_NR_KEYCTL = {"x86_64": 250, "aarch64": 219}
_JOIN_SESSION_KEYRING, _SETPERM = 1, 5
_PERMISSIONS = 0x3F1B0000
"""All for who possesses it; its owner may see, read, search and link it: as runc sets it."""


def join_session(name: str) -> None:
    """Give this process, and what it starts, the session keyring `name` of root instead of its own.

    Made when there is none. A kernel without keyrings has nothing to hand on. Raises OSError.
    """
    number = _NR_KEYCTL[os.uname().machine]
    try:
        keyring = syscall(number, _JOIN_SESSION_KEYRING, name.encode())
        syscall(number, _SETPERM, keyring, _PERMISSIONS)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
