"""Runs a function in a child and kills the child at its N-th system call on files: ptrace(2).

So the tests meet every state that kill -9 can leave on the disk, without a switch in the product.
Calls that cannot change a file are not counted: their number differs from run to run.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_TRACEME, _SYSCALL, _SETOPTIONS, _GET_SYSCALL_INFO = 0, 24, 0x4200, 0x420E
_O_TRACESYSGOOD, _O_TRACECLONE, _O_EXITKILL = 1, 8, 0x100000
_WALL = 0x40000000
_STOPPED_AT_SYSCALL = signal.SIGTRAP | 0x80
_ON_ENTRY = 1
_INFO = struct.Struct("=B7x8x8xQ")
"""The beginning of struct ptrace_syscall_info: the kind of the stop, and the number of the call."""
_ON_FILES = {
    # write, open, ioctl, pwrite, writev, sendfile, fsync to ftruncate, rename to unlink, symlink,
    # chmod to lchown, mknod, sync, the xattr calls, openat to renameat, linkat to fchmodat,
    # utimensat, fallocate, syncfs, renameat2, copy_file_range, openat2, fchmodat2
    "x86_64": {
        1, 2, 16, 18, 20, 40, *range(74, 78), *range(82, 89), *range(90, 95), 133, 162,
        *range(188, 200), *range(257, 269), 280, 285, 306, 316, 326, 437, 452,
    },
    # the xattr calls, ioctl, mknodat to renameat, truncate to fallocate, fchmod to openat, write,
    # writev, pwrite, sendfile, sync to fdatasync, utimensat, syncfs, renameat2, copy_file_range,
    # openat2, fchmodat2
    "aarch64": {
        *range(5, 17), 29, *range(33, 39), *range(45, 48), *range(52, 57), 64, 66, 68, 71,
        *range(81, 84), 88, 267, 276, 285, 437, 452,
    },
}[os.uname().machine]  # fmt: skip
"""Numbers of the system calls that can change a file or make it durable. Source: the kernel's
syscall_64.tbl and asm-generic/unistd.h."""
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long] * 4
_libc.ptrace.restype = ctypes.c_long


class ChildFailed(Exception):
    """The child ended by itself, with an error."""


def killed_at(step: int, change: Callable[[], None]) -> bool:
    """Run `change` in a child that is killed as it enters its `step`-th system call on files.

    All threads count together. Returns whether there was such a call; otherwise `change` ran to its
    end. Raises ChildFailed when `change` raised.
    """
    child = os.fork()
    if child == 0:
        _be_traced(change)
    os.waitpid(child, _WALL)
    _ptrace(_SETOPTIONS, child, _O_TRACESYSGOOD | _O_TRACECLONE | _O_EXITKILL)
    _ptrace(_SYSCALL, child, 0)
    return _step(child, step)


def _be_traced(change: Callable[[], None]) -> None:
    status = 1
    try:
        os.setpgid(0, 0)
        _ptrace(_TRACEME, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        change()
        status = 0
    except BaseException:  # noqa: BLE001 - nothing of a forked child may get back into pytest
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _step(child: int, step: int) -> bool:
    """Let the child and its threads run from system call to system call, up to number `step`."""
    entered = 0
    while True:
        task, status = os.waitpid(-child, _WALL)
        if not os.WIFSTOPPED(status):
            if task != child:
                continue  # a thread
            if os.WIFSIGNALED(status):
                return True
            if status:
                raise ChildFailed(f"status {os.waitstatus_to_exitcode(status)}")
            return False
        stop = os.WSTOPSIG(status)
        entered += stop == _STOPPED_AT_SYSCALL and _enters_call_on_files(task)
        if entered == step:
            os.kill(child, signal.SIGKILL)
            continue
        # The first stop of a thread and ptrace's own events are no signals to the child.
        ours = stop in (_STOPPED_AT_SYSCALL, signal.SIGTRAP, signal.SIGSTOP)
        _ptrace(_SYSCALL, task, 0 if ours else stop)


def _enters_call_on_files(task: int) -> bool:
    info = ctypes.create_string_buffer(_INFO.size)
    _ptrace(_GET_SYSCALL_INFO, task, ctypes.addressof(info), address=_INFO.size)
    stop, number = _INFO.unpack(info.raw)
    return stop == _ON_ENTRY and number in _ON_FILES


def _ptrace(request: int, task: int, data: int, *, address: int = 0) -> None:
    if _libc.ptrace(request, task, address, data) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), f"ptrace request {request}")
