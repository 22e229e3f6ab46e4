"""Fills another process's memory, and reads its events, by userfaultfd(2). Lean.

The descriptors are CRIU's: non-cooperative and non-blocking. Source: ioctl_userfaultfd(2),
userfaultfd(2), Linux Documentation/admin-guide/mm/userfaultfd.rst.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import struct

from shim.kernel.libc import call, syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Final

PAGE: Final = mmap.PAGESIZE

_NR = {"x86_64": 323, "aarch64": 282}
_READ, _WRITE = 2 << 30, 1 << 30
_TYPE = 0xAA << 8
_API = _READ | _WRITE | 24 << 16 | _TYPE | 0x3F
_API_VERSION, _MISSING = 0xAA, 1
_REGISTER = _READ | _WRITE | 32 << 16 | _TYPE | 0x00
_WAKE = _READ | 16 << 16 | _TYPE | 0x02
_COPY = _READ | _WRITE | 40 << 16 | _TYPE | 0x03
_CONTINUE = _READ | _WRITE | 32 << 16 | _TYPE | 0x07
_ZEROPAGE = _READ | _WRITE | 32 << 16 | _TYPE | 0x04

_MESSAGE = struct.Struct("=BxxxxxxxQQQ")
_MESSAGES = 64
"""Read at once."""

FAULT, FORK, REMAP, REMOVE, UNMAP = 0x12, 0x13, 0x14, 0x15, 0x16
"""Kinds of messages. The kernel sends REMOVE for MADV_DONTNEED and MADV_FREE."""


class Changing(Exception):
    """An area is being changed: nothing can be filled until the event is read (EAGAIN)."""


class Present(Exception):
    """The page is there already (EEXIST)."""


class NotOurs(Exception):
    """No registered area covers the range (ENOENT): it was unmapped, or is several areas."""


class Gone(Exception):
    """The process has exited or executed another program (ESRCH)."""


REFUSALS = (Present, NotOurs, Gone)
"""The exceptions of `copy` into memory of our own, when something is wrong."""

_MEANING = {
    errno.EAGAIN: Changing, errno.EEXIST: Present, errno.ENOENT: NotOurs, errno.ESRCH: Gone
}  # fmt: skip


class Message:
    """A message. For FAULT `start` is the address, for FORK the new descriptor.

    For REMOVE and UNMAP the range is from `start` to `end`; for REMAP the `end` - `start` bytes
    from `start` on are at `to` now. turn: the number of the read that returned the message.
    """

    __slots__ = ("end", "kind", "start", "to", "turn")

    def __init__(self, kind: int, start: int, end: int = 0, to: int = 0, turn: int = 0) -> None:
        self.kind, self.start, self.end, self.to, self.turn = kind, start, end, to, turn

    def __repr__(self) -> str:
        return f"Message({self.kind:#x}, {self.start:#x}, {self.end:#x}, {self.to:#x})"


def unavailable() -> str:
    """Returns why this process cannot have a userfaultfd; empty when it can."""
    try:
        os.close(syscall(_NR[os.uname().machine], os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        return f"no userfaultfd: {error.strerror}"
    except KeyError:
        return "no userfaultfd on this architecture"
    return ""


def copy(fd: int, address: int, source: int, size: int) -> int:
    """Install `size` bytes from `source`, in our memory, at `address`; wake the threads that wait.

    All are multiples of the page size. Returns the bytes installed, which may be fewer. Raises
    Changing, Present, NotOurs, Gone when not even the first page could be installed; OSError.
    """
    return _installed(fd, _COPY, (ctypes.c_uint64 * 5)(address, source, size, 0, 0))


def copy_all(fd: int, address: int, source: int, size: int) -> None:
    """Copy all, into memory that nobody else changes. Raises as `copy`, but not Changing."""
    done = 0
    while done < size:
        with contextlib.suppress(Changing):
            done += copy(fd, address + done, source + done, size - done)


@contextlib.contextmanager
def registered(address: int, size: int) -> Iterator[int]:
    """Yields a userfaultfd for memory of our own: `copy` fills missing pages there in the `with`.

    Without it, the kernel zeroes a page before it is written; and `write` locks the file, so that
    threads cannot fill it together. Raises OSError.
    """
    fd = syscall(_NR[os.uname().machine], os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        call("ioctl", fd, ctypes.c_ulong(_API), (ctypes.c_uint64 * 3)(_API_VERSION, 0, 0))
        area = (ctypes.c_uint64 * 4)(address, size, _MISSING, 0)
        call("ioctl", fd, ctypes.c_ulong(_REGISTER), area)
        yield fd
    finally:
        os.close(fd)


def zero(fd: int, address: int, size: int) -> int:
    """Install zeros, otherwise as `copy`."""
    return _installed(fd, _ZEROPAGE, (ctypes.c_uint64 * 4)(address, size, 0, 0))


def _installed(fd: int, request: int, argument: ctypes.Array[ctypes.c_uint64]) -> int:
    try:
        call("ioctl", fd, ctypes.c_ulong(request), argument)
    except OSError as error:
        # The last field is the number of bytes done, or the errno when nothing was done.
        done = ctypes.c_int64(argument[-1]).value
        if done > 0:
            return done
        raise _MEANING.get(error.errno or 0, OSError)(*error.args) from error
    return int(argument[-1])


def is_changing(fd: int) -> bool:
    """Whether an event is under way that was not read to its end.

    The kernel checks this before it looks at the request, so that an empty request tells.
    """
    try:
        call("ioctl", fd, ctypes.c_ulong(_COPY), (ctypes.c_uint64 * 5)())
    except OSError as error:
        return error.errno == errno.EAGAIN
    return False


def is_registered(fd: int, address: int, size: int = PAGE) -> bool:
    """Whether a range is in a single area that belongs to the descriptor. Raises Changing, Gone.

    UFFDIO_CONTINUE, which is for shared memory, fails for private memory after the kernel has
    looked up the area, and does nothing.
    """
    try:
        call("ioctl", fd, ctypes.c_ulong(_CONTINUE), (ctypes.c_uint64 * 4)(address, size, 0, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.ESRCH):
            raise _MEANING[error.errno](*error.args) from error
        return error.errno != errno.ENOENT
    return True


def wake(fd: int, address: int, size: int) -> None:
    """Let threads that wait for a present page look again. Raises OSError."""
    call("ioctl", fd, ctypes.c_ulong(_WAKE), (ctypes.c_uint64 * 2)(address, size))


def messages(fd: int) -> list[Message]:
    """Returns the kernel's messages, faults before events. Raises OSError.

    Reading an event lets the thread that caused it go on.
    """
    try:
        data = os.read(fd, _MESSAGES * _MESSAGE.size)
    except BlockingIOError:
        return []
    return [_message(*fields) for fields in _MESSAGE.iter_unpack(data)]


def _message(kind: int, first: int, second: int, third: int) -> Message:
    if kind == FAULT:
        return Message(FAULT, second)  # the first field contains flags
    if kind == FORK:
        return Message(FORK, first & 0xFFFFFFFF)
    if kind == REMAP:
        return Message(REMAP, first, first + third, second)
    return Message(kind, first, second)
