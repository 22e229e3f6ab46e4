"""Attaches loop devices that the kernel detaches when no process has them open any more.

Loop devices belong to the machine, not to a namespace, so a test never keeps a device longer than
its mount. Source: loop(4), linux/loop.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

from shim.kernel.libc import call
from tests.node.kernel import mount

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_CTL_GET_FREE, _CONFIGURE = 0x4C82, 0x4C0A
_AUTOCLEAR = 4
_TRIES = 100


@contextmanager
def mounted(file_fd: int, place: Path, kind: str, options: str, *, block: int) -> Iterator[None]:
    """Mount the file system in an open file at `place`, until the end. Raises OSError."""
    device, name = _attached(file_fd, block)
    try:
        mount(name, str(place), kind, 0, options)
    finally:
        os.close(device)  # from here on the mount holds the device
    try:
        yield
    finally:
        call("umount2", os.fsencode(place), 0, about=str(place))


def _attached(file_fd: int, block: int) -> tuple[int, str]:
    config = struct.pack("=II52xI160x64x", file_fd, block, _AUTOCLEAR).ljust(304, b"\0")
    for left in reversed(range(_TRIES)):
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            name = f"/dev/loop{fcntl.ioctl(control, _CTL_GET_FREE)}"
        finally:
            os.close(control)
        device = os.open(name, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(device, _CONFIGURE, config)
        except OSError as error:
            os.close(device)
            # Another process of this machine took the device between the two calls.
            if error.errno != errno.EBUSY or not left:
                raise
        else:
            return device, name
    raise AssertionError("not reached")
