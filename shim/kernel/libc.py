"""System calls that Python 3.11 has no function for, through ctypes. Lean.

One border for errno: `call` and `syscall` raise OSError, so no caller looks at a return code.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_PROT_READ, _PROT_WRITE, _MAP_SHARED = 1, 2, 1
_MADV_POPULATE_READ = 22
_MAP_FAILED = ctypes.c_void_p(-1).value

# The same numbers on x86_64 and arm64: everything since Linux 5.0 is numbered alike.
NR_MOVE_MOUNT = 429
NR_FSOPEN = 430
NR_FSCONFIG = 431
NR_FSMOUNT = 432
NR_OPENAT2 = 437
NR_PROCESS_MADVISE = 440


def call(function: str, *arguments: object, about: str | None = None) -> int:
    """Call a libc function that returns -1 and errno on failure.

    Raises OSError with `about` (a path) as its file name.
    """
    result: int = getattr(_libc, function)(*arguments)
    if result == -1:
        raise _os_error(about)
    return result


def syscall(number: int, *arguments: object, about: str | None = None) -> int:
    """Make a system call by number. Integers are passed as longs. Raises OSError."""
    longs = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in arguments]
    result: int = _libc.syscall(ctypes.c_long(number), *longs)
    if result == -1:
        raise _os_error(about)
    return result


def map_readable(fd: int, size: int) -> int:
    """Map a file for the rest of this process's life; the address. Raises OSError.

    For addresses that are given to the kernel: `mmap.mmap` does not tell that of a read-only one.
    """
    return _mapped(fd, size, _PROT_READ)


@contextlib.contextmanager
def mapped_shared(fd: int, size: int, *, writable: bool = True) -> Iterator[int]:
    """Map a file shared in the `with`; the address. Raises OSError."""
    address = _mapped(fd, size, _PROT_READ | (_PROT_WRITE if writable else 0))
    try:
        yield address
    finally:
        call("munmap", address, size)


def populate_read(address: int, size: int) -> None:
    """Have a mapping in our page tables, read from the disk where it must be. Raises OSError."""
    call("madvise", ctypes.c_void_p(address), ctypes.c_size_t(size), _MADV_POPULATE_READ)


def _mapped(fd: int, size: int, protection: int) -> int:
    address: int | None = _libc.mmap(
        None, ctypes.c_size_t(size), protection, _MAP_SHARED, fd, ctypes.c_long(0)
    )
    if address is None or address == _MAP_FAILED:
        raise _os_error(None)
    return address


def _os_error(about: str | None) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code), about) if about else OSError(code, os.strerror(code))
