"""System calls made by another process, by ptrace: process_madvise(2) cannot do ours.

The process is stopped for some hundred microseconds; a system call that it was in is restarted by
the kernel, as after any stop.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from shim.kernel import procfs

DONTNEED: Final = 4
HUGEPAGE: Final = 14
POPULATE_WRITE: Final = 23
_SYS_MADVISE: Final = 28
_SYSCALL: Final = b"\x0f\x05"
_WALL: Final = 0x40000000
_GETREGS, _SETREGS, _SINGLESTEP, _DETACH = 12, 13, 9, 17
_SEIZE, _INTERRUPT = 0x4206, 0x4207
_NAMES: Final = (
    "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss "
    "fs_base gs_base ds es fs gs"
)


class Registers(ctypes.Structure):
    """struct user_regs_struct of x86-64."""


Registers._fields_ = [(name, ctypes.c_ulonglong) for name in _NAMES.split()]
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def _ptrace(request: int, pid: int, data: object = None) -> None:
    if _libc.ptrace(request, pid, None, data) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"ptrace {request:#x}: {os.strerror(code)}")


@contextmanager
def stopped(pid: int) -> Iterator[Registers]:
    """The main thread of `pid` stopped, and its registers; they are put back at the end."""
    _ptrace(_SEIZE, pid)
    _ptrace(_INTERRUPT, pid)
    os.waitpid(pid, _WALL)
    kept = Registers()
    _ptrace(_GETREGS, pid, ctypes.byref(kept))
    try:
        yield Registers.from_buffer_copy(kept)
    finally:
        _ptrace(_SETREGS, pid, ctypes.byref(kept))
        _ptrace(_DETACH, pid)


def madvise(pid: int, ranges: list[tuple[int, int]], advice: int) -> None:
    """madvise(start, size, advice) in `pid` for each range. Raises OSError."""
    for start, size in ranges:
        call(pid, _SYS_MADVISE, start, size, advice)


def call(pid: int, number: int, *arguments: int) -> int:
    """The system call `number` in `pid`, with up to three arguments. Raises OSError."""
    with stopped(pid) as registers:
        registers.rip = _syscall_at(pid, registers.rip)
        registers.rax, registers.orig_rax = number, 2**64 - 1
        registers.rdi, registers.rsi, registers.rdx = (*arguments, 0, 0, 0)[:3]
        _ptrace(_SETREGS, pid, ctypes.byref(registers))
        _ptrace(_SINGLESTEP, pid)
        os.waitpid(pid, _WALL)
        _ptrace(_GETREGS, pid, ctypes.byref(registers))
        result = ctypes.c_longlong(registers.rax).value
        if result < 0:
            raise OSError(-result, f"system call {number} in {pid}: {os.strerror(-result)}")
        return result


def _syscall_at(pid: int, rip: int) -> int:
    """Returns the address of a syscall instruction: just behind us, or the first in the vdso."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        if os.pread(memory.fileno(), 2, rip - 2) == _SYSCALL:
            return rip - 2
        for area in procfs.areas(pid, b"[vdso]"):
            start, end = area.range
            return start + os.pread(memory.fileno(), end - start, start).index(_SYSCALL)
    raise LookupError(f"no vdso in {pid}")
