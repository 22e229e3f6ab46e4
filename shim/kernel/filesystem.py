"""Tells a descriptor's file system and a file's fs-verity digest, and edits ranges of files. Lean.

Sources: statfs(2), linux/magic.h, linux/fsverity.h, Documentation/filesystems/fsverity.rst.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from shim.kernel.libc import call

EXT4, XFS, BTRFS, TMPFS = 0xEF53, 0x58465342, 0x9123683E, 0x01021994

_STATFS_BYTES = 256
_SHA256, _BLOCK = 1, 4096
_ENABLE = struct.Struct("=IIIIQIIQ88x")  # struct fsverity_enable_arg
_DIGEST = struct.Struct("=HH32s")  # struct fsverity_digest with room for SHA-256
_FS_IOC_ENABLE_VERITY = 0x40806685
_FS_IOC_MEASURE_VERITY = 0xC0046686
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_CANNOT = (errno.ENOTTY, errno.EOPNOTSUPP, errno.ENODATA, errno.EINVAL, errno.EPERM)


def magic(fd: int) -> int:
    """Returns the `f_type` of the file system that `fd` is on. Raises OSError."""
    from ctypes import create_string_buffer

    buffer = create_string_buffer(_STATFS_BYTES)
    call("fstatfs", fd, buffer)
    found: int = struct.unpack_from("=l" if struct.calcsize("l") == 4 else "=q", buffer)[0]
    return found & 0xFFFFFFFF


def punch_hole(fd: int, start: int, size: int) -> None:
    """Free the blocks of a range of a file, which then reads as zeros. Raises OSError.

    Source: fallocate(2).
    """
    from ctypes import c_long

    call("fallocate", fd, _PUNCH_HOLE | _KEEP_SIZE, c_long(start), c_long(size))


def write_at(fd: int, view: memoryview, offset: int) -> None:
    """Write all of `view`, from an offset in the file on. Raises OSError."""
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def enable_verity(fd: int) -> bool:
    """Make the file read-only for ever; the kernel then checks its pages whenever it reads them.

    fd: opened for reading, while nobody has the file open for writing. Returns False where the
    kernel or the file system cannot. No error when fs-verity is enabled already. Raises OSError.
    """
    arguments = _ENABLE.pack(1, _SHA256, _BLOCK, 0, 0, 0, 0, 0)
    try:
        fcntl.ioctl(fd, _FS_IOC_ENABLE_VERITY, arguments)
    except OSError as error:
        if error.errno == errno.EEXIST:
            return True
        if error.errno not in _CANNOT:
            raise
        return False
    return True


def measure_verity(fd: int) -> str:
    """Returns the file's fs-verity digest in hexadecimal; empty without one. Raises OSError.

    A digest of another algorithm than SHA-256 counts as none.
    """
    buffer = bytearray(_DIGEST.pack(0, 32, b""))
    try:
        fcntl.ioctl(fd, _FS_IOC_MEASURE_VERITY, buffer)
    except OSError as error:
        if error.errno == errno.EOVERFLOW or error.errno in _CANNOT:
            return ""
        raise
    algorithm, size, digest = _DIGEST.unpack(buffer)
    return digest.hex() if (algorithm, size) == (_SHA256, 32) else ""
