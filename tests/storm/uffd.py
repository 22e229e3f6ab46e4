"""Makes userfaultfds as CRIU's restorer does for the memory of a process.

Source: CRIU, criu/uffd.c (features, flags), criu/pie/restorer.c (registering).
"""

import ctypes
import os
import struct
from typing import Final

from shim.kernel.libc import call, syscall

_NR_USERFAULTFD: Final = {"x86_64": 323, "aarch64": 282}
_API: Final = 0xC018AA3F
_REGISTER: Final = 0xC020AA00
_VERSION: Final = 0xAA
_FORK, _REMAP, _REMOVE, _UNMAP = 1 << 1, 1 << 2, 1 << 3, 1 << 6
FEATURES: Final = _FORK | _REMAP | _REMOVE | _UNMAP
_MISSING: Final = 1


def opened() -> int:
    """Returns a descriptor for the memory of this process. Raises OSError."""
    fd = syscall(_NR_USERFAULTFD[os.uname().machine], os.O_CLOEXEC | os.O_NONBLOCK)
    call("ioctl", fd, ctypes.c_ulong(_API), (ctypes.c_uint64 * 3)(_VERSION, FEATURES, 0))
    return fd


def register(fd: int, start: int, end: int) -> None:
    """Make accesses to missing pages of a range wait for the server. Raises OSError."""
    call("ioctl", fd, ctypes.c_ulong(_REGISTER),
         (ctypes.c_uint64 * 4)(start, end - start, _MISSING, 0))  # fmt: skip


def is_available() -> bool:
    """Whether this process may have a userfaultfd."""
    try:
        os.close(opened())
    except OSError:
        return False
    return True


def handed_over(pid: int) -> bytes:
    """Returns the bytes that CRIU sends before the descriptor of a process."""
    return struct.pack("=i", pid)


FINISHED: Final = struct.pack("=I", 0x52535446)
