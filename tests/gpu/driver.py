"""The CUDA driver's checkpoint calls through ctypes, and a stand-in for machines without a GPU.

Structures are those of cuda.h of CUDA 13.0, group CUDA_CHECKPOINT. Every call returns the driver's
own code; 0 is success. The stand-in does to `fake_worker` what the driver does to a CUDA process.
"""

import contextlib
import ctypes
import os
import time
from pathlib import Path
from typing import Final, Protocol

STATES: Final = ("running", "locked", "checkpointed", "failed")
SUCCESS: Final = 0
INVALID_VALUE: Final = 1
NOT_FOUND: Final = 500
ILLEGAL_STATE: Final = 401

Pairs = list[tuple[bytes, bytes]]
"""Which GPU becomes which at a restore: UUIDs of 16 octets, old and new."""


class LockArgs(ctypes.Structure):
    """CUcheckpointLockArgs; a timeout of 0 ms is none."""


LockArgs._fields_ = [
    ("timeout_ms", ctypes.c_uint),
    ("reserved0", ctypes.c_uint),
    ("reserved1", ctypes.c_uint64 * 7),
]


class CheckpointArgs(ctypes.Structure):
    """CUcheckpointCheckpointArgs."""


CheckpointArgs._fields_ = [("reserved", ctypes.c_uint64 * 8)]


class GpuPair(ctypes.Structure):
    """CUcheckpointGpuPair."""


GpuPair._fields_ = [("old", ctypes.c_ubyte * 16), ("new", ctypes.c_ubyte * 16)]


class RestoreArgs(ctypes.Structure):
    """CUcheckpointRestoreArgs."""


RestoreArgs._fields_ = [
    ("pairs", ctypes.POINTER(GpuPair)),
    ("pairs_count", ctypes.c_uint),
    ("reserved", ctypes.c_char * (52 - ctypes.sizeof(ctypes.c_void_p))),
    ("reserved1", ctypes.c_uint64),
]


class UnlockArgs(ctypes.Structure):
    """CUcheckpointUnlockArgs."""


UnlockArgs._fields_ = [("reserved", ctypes.c_uint64 * 8)]


class Driver(Protocol):
    """The calls that the probe makes of a driver. Every `code` is a CUresult."""

    def init(self) -> int:
        """cuInit."""

    def version(self) -> int:
        """Returns the answer of cuDriverGetVersion, 13000 for CUDA 13.0."""

    def uuids(self) -> list[bytes]:
        """The visible devices."""

    def name(self, code: int) -> str:
        """CUDA_SUCCESS and so on."""

    def restore_thread(self, pid: int) -> tuple[int, int]:
        """(code, thread id)."""

    def state(self, pid: int) -> tuple[int, int]:
        """(code, index in STATES)."""

    def lock(self, pid: int, timeout_ms: int) -> int:
        """running -> locked."""

    def checkpoint(self, pid: int) -> int:
        """locked -> checkpointed."""

    def restore(self, pid: int, pairs: Pairs) -> int:
        """checkpointed -> locked."""

    def unlock(self, pid: int) -> int:
        """locked -> running."""

    def symbol(self, name: str, version: int) -> tuple[int, bool]:
        """(code, found) of cuGetProcAddress."""


class Cuda:
    """libcuda.so.1."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL("libcuda.so.1")

    def init(self) -> int:
        return int(self._lib.cuInit(0))

    def version(self) -> int:
        number = ctypes.c_int()
        self._lib.cuDriverGetVersion(ctypes.byref(number))
        return number.value

    def uuids(self) -> list[bytes]:
        count, found = ctypes.c_int(), []
        self._lib.cuDeviceGetCount(ctypes.byref(count))
        for index in range(count.value):
            device, uuid = ctypes.c_int(), (ctypes.c_ubyte * 16)()
            self._lib.cuDeviceGet(ctypes.byref(device), index)
            self._lib.cuDeviceGetUuid_v2(ctypes.byref(uuid), device)
            found.append(bytes(uuid))
        return found

    def name(self, code: int) -> str:
        text = ctypes.c_char_p()
        self._lib.cuGetErrorName(code, ctypes.byref(text))
        return (text.value or b"?").decode()

    def restore_thread(self, pid: int) -> tuple[int, int]:
        tid = ctypes.c_int()
        return int(
            self._lib.cuCheckpointProcessGetRestoreThreadId(pid, ctypes.byref(tid))
        ), tid.value

    def state(self, pid: int) -> tuple[int, int]:
        state = ctypes.c_int()
        return int(self._lib.cuCheckpointProcessGetState(pid, ctypes.byref(state))), state.value

    def lock(self, pid: int, timeout_ms: int) -> int:
        args = LockArgs(timeout_ms=timeout_ms)
        return int(self._lib.cuCheckpointProcessLock(pid, ctypes.byref(args)))

    def checkpoint(self, pid: int) -> int:
        args = CheckpointArgs()
        return int(self._lib.cuCheckpointProcessCheckpoint(pid, ctypes.byref(args)))

    def restore(self, pid: int, pairs: Pairs) -> int:
        args = RestoreArgs()
        listed = (GpuPair * max(1, len(pairs)))()
        for place, (old, new) in zip(listed, pairs, strict=False):
            place.old[:], place.new[:] = old, new
        if pairs:
            args.pairs, args.pairs_count = listed, len(pairs)
        return int(self._lib.cuCheckpointProcessRestore(pid, ctypes.byref(args)))

    def unlock(self, pid: int) -> int:
        args = UnlockArgs()
        return int(self._lib.cuCheckpointProcessUnlock(pid, ctypes.byref(args)))

    def symbol(self, name: str, version: int) -> tuple[int, bool]:
        found, status = ctypes.c_void_p(), ctypes.c_int()
        code = self._lib.cuGetProcAddress_v2(
            name.encode(),
            ctypes.byref(found),
            version,
            ctypes.c_uint64(0),
            ctypes.byref(status),
        )
        return int(code), bool(found.value)


class Fake:
    """Asks `fake_worker` to move its payload as the driver would."""

    def init(self) -> int:
        return SUCCESS

    def version(self) -> int:
        return 0

    def uuids(self) -> list[bytes]:
        return [bytes(range(16))]

    def name(self, code: int) -> str:
        return "FAKE_SUCCESS" if code == SUCCESS else f"FAKE_{code}"

    def restore_thread(self, pid: int) -> tuple[int, int]:
        return SUCCESS, pid

    def state(self, pid: int) -> tuple[int, int]:
        try:
            return SUCCESS, STATES.index((self._home(pid) / "state").read_text())
        except (OSError, ValueError):
            return NOT_FOUND, 0

    def lock(self, pid: int, timeout_ms: int) -> int:
        del timeout_ms
        return self._change(pid, "running", "locked")

    def checkpoint(self, pid: int) -> int:
        return self._change(pid, "locked", "checkpointed")

    def restore(self, pid: int, pairs: Pairs) -> int:
        if any(new != self.uuids()[0] for _, new in pairs):
            return INVALID_VALUE
        return self._change(pid, "checkpointed", "locked")

    def unlock(self, pid: int) -> int:
        return self._change(pid, "locked", "running")

    def symbol(self, name: str, version: int) -> tuple[int, bool]:
        del name, version
        return NOT_FOUND, False

    def _home(self, pid: int) -> Path:
        # Not from its command line, which cannot be read while its memory is lazy.
        return Path(os.readlink(f"/proc/{pid}/cwd"))

    def _change(self, pid: int, old: str, new: str) -> int:
        state, thread = self.state(pid), 10.0
        if state[0] or STATES[state[1]] != old:
            return ILLEGAL_STATE
        home = self._home(pid)
        (home / "driver.new").write_text(new)
        (home / "driver.new").rename(home / "driver")
        until = time.monotonic() + thread
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                if (home / "state").read_text() == new:
                    return SUCCESS
            time.sleep(0.002)
        return NOT_FOUND


def load(fake: bool) -> Driver:
    """Raises OSError where there is no libcuda."""
    return Fake() if fake else Cuda()
