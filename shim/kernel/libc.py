"""Makes system calls that Python 3.11 has no function for, through ctypes. Lean.

A single border for errno: `call` and `syscall` raise OSError, so no caller looks at a return code.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_PROT_NONE, _PROT_READ, _PROT_WRITE = 0, 1, 2
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS = 0x01, 0x02, 0x10, 0x20
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23
MADV_COLLAPSE = 25
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
    """Map a file for the rest of this process's life. Returns the address. Raises OSError.

    For addresses that are given to the kernel: `mmap.mmap` does not tell the address of a read-only
    mapping.
    """
    return _mapped(0, fd, size, _PROT_READ, _MAP_SHARED)


@contextlib.contextmanager
def mapped_shared(fd: int, size: int, *, writable: bool = True, aligned: int = 0) -> Iterator[int]:
    """Map a file shared in the `with`. Yields the address, aligned to `aligned`. Raises OSError."""
    reserved, length = 0, size + aligned
    if aligned:
        reserved = _mapped(0, -1, length, _PROT_NONE, _MAP_PRIVATE | _MAP_ANONYMOUS)
    try:
        address = -(-reserved // aligned) * aligned if aligned else 0
        protection = _PROT_READ | (_PROT_WRITE if writable else 0)
        flags = _MAP_SHARED | (_MAP_FIXED if address else 0)
        address = _mapped(address, fd, size, protection, flags)
        reserved = reserved or address
        yield address
    finally:
        if reserved:
            call("munmap", reserved, length)


def populate_read(address: int, size: int) -> None:
    """Have a mapping in our page tables, read from the disk if necessary. Raises OSError."""
    _advise(address, size, _MADV_POPULATE_READ)


def populate_write(address: int, size: int) -> None:
    """Have a writable page at each address of a mapping in our page tables. Raises OSError."""
    _advise(address, size, _MADV_POPULATE_WRITE)


def collapse(address: int, size: int) -> None:
    """Make huge pages of the memory at an address, with zeros where no page is. Raises OSError.

    Not where a userfaultfd is registered. Source: madvise(2), MADV_COLLAPSE, Linux 6.1.
    """
    _advise(address, size, MADV_COLLAPSE)


def copy_memory(target: int, source: int, size: int) -> None:
    """Copy within our own memory. A page that cannot be had raises OSError, and no signal."""
    ranges = (ctypes.c_uint64 * 4)(target, size, source, size)
    at = ctypes.addressof(ranges)
    one = ctypes.c_ulong(1)
    done = _libc.process_vm_readv(
        os.getpid(), ctypes.c_void_p(at), one, ctypes.c_void_p(at + 16), one, ctypes.c_ulong(0)
    )
    if done == -1:
        raise _os_error(None)
    if done < size:
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))


def _advise(address: int, size: int, advice: int) -> None:
    call("madvise", ctypes.c_void_p(address), ctypes.c_size_t(size), advice)


def _mapped(address: int, fd: int, size: int, protection: int, flags: int) -> int:
    found: int | None = _libc.mmap(
        ctypes.c_void_p(address), ctypes.c_size_t(size), protection, flags, fd, ctypes.c_long(0)
    )
    if found is None or found == _MAP_FAILED:
        raise _os_error(None)
    return found


def _os_error(about: str | None) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code), about) if about else OSError(code, os.strerror(code))
