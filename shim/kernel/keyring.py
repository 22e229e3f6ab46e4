"""Joins session keyrings. Lean. Sources: keyctl(2), session-keyring(7)."""

from __future__ import annotations

import errno
import os

from shim.kernel.libc import syscall

_NR_KEYCTL = {"x86_64": 250, "aarch64": 219}
_JOIN_SESSION_KEYRING, _SETPERM = 1, 5
_PERMISSIONS = 0x3F1B0000
"""All for a possessor; the owner may see, read, search and link the keyring: as runc sets it."""


def join_session(name: str) -> None:
    """Give this process and its children root's session keyring `name` instead of their own.

    The keyring is made if it is missing. A kernel without keyrings has nothing to pass on. Raises
    OSError.
    """
    number = _NR_KEYCTL[os.uname().machine]
    try:
        keyring = syscall(number, _JOIN_SESSION_KEYRING, name.encode())
        syscall(number, _SETPERM, keyring, _PERMISSIONS)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
