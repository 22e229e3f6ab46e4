"""The CUDA driver's checkpoint calls, made by a process of their own.

A call can hang, and whoever hangs with it must be one that can be killed. Run as a program with the
number of a SOCK_SEQPACKET socket: one JSON object a request, one an answer, in turn. It needs no
cuInit. `{"do": DO, "pid": PID}` with DO `state`, `thread`, `lock` (`timeout_ms`), `checkpoint`,
`restore` (`pairs` of UUIDs in hexadecimal) or `unlock` answers `{"code", "name"}` with the driver's
CUresult, and `state` or `tid`.

`{"do": "guard", "pids": [...], "within_s": S, "lock": PATH}` makes it the guard of a capture: when
the socket ends without `{"do": "dismiss"}`, S seconds are over, or the daemon is stopped, it brings
these processes back to *running*. PATH is locked meanwhile.

Standard library only, and nothing of ours: it is started from a file. Structures: cuda.h of CUDA
13.0, group CUDA_CHECKPOINT; a test compares them with cuda-bindings.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import socket
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

LIBRARIES = ("libcuda.so.1", "/run/nvidia/driver/usr/lib/x86_64-linux-gnu/libcuda.so.1")
"""The second is where a driver container of NVIDIA's GPU operator has it."""
STATES = ("running", "locked", "checkpointed", "failed")
UUID_BYTES = 16
_MOST_BYTES = 1 << 16
_LOOK_S = 0.2
_STOPPED_LOOKS = 5
"""A daemon that a debugger or a person stops for less than that is waited for."""


class LockArgs(ctypes.Structure):
    """CUcheckpointLockArgs; a timeout of 0 ms is none."""


LockArgs._fields_ = [
    ("timeoutMs", ctypes.c_uint),
    ("reserved0", ctypes.c_uint),
    ("reserved1", ctypes.c_uint64 * 7),
]


class CheckpointArgs(ctypes.Structure):
    """CUcheckpointCheckpointArgs."""


CheckpointArgs._fields_ = [
    ("reserved", ctypes.c_uint64 * 8),
]


class GpuPair(ctypes.Structure):
    """CUcheckpointGpuPair."""


GpuPair._fields_ = [
    ("oldUuid", ctypes.c_ubyte * UUID_BYTES),
    ("newUuid", ctypes.c_ubyte * UUID_BYTES),
]


class RestoreArgs(ctypes.Structure):
    """CUcheckpointRestoreArgs."""


RestoreArgs._fields_ = [
    ("gpuPairs", ctypes.POINTER(GpuPair)),
    ("gpuPairsCount", ctypes.c_uint),
    ("reserved", ctypes.c_char * (52 - ctypes.sizeof(ctypes.c_void_p))),
    ("reserved1", ctypes.c_uint64),
]


class UnlockArgs(ctypes.Structure):
    """CUcheckpointUnlockArgs."""


UnlockArgs._fields_ = [
    ("reserved", ctypes.c_uint64 * 8),
]


class CheckpointDriver:
    """libcuda. Raises OSError when there is none."""

    def __init__(self) -> None:
        self._lib = _loaded()

    def serve(self, request: dict[str, Any]) -> dict[str, object]:
        """The answer to one request. Raises AttributeError where the driver lacks the call."""
        pid, do = int(request["pid"]), request["do"]
        if do == "state":
            return self.state(pid)
        if do == "thread":
            tid = ctypes.c_int()
            code = self._lib.cuCheckpointProcessGetRestoreThreadId(pid, ctypes.byref(tid))
            return self._told(code) | {"tid": tid.value}
        if do == "lock":
            return self.lock(pid, int(request["timeout_ms"]))
        if do == "restore":
            return self.restore(pid, request.get("pairs") or ())
        return {"checkpoint": self.checkpoint, "unlock": self.unlock}[do](pid)

    def state(self, pid: int) -> dict[str, object]:
        state = ctypes.c_int()
        told = self._told(self._lib.cuCheckpointProcessGetState(pid, ctypes.byref(state)))
        return told | {"state": "" if told["code"] else STATES[state.value]}

    def lock(self, pid: int, timeout_ms: int) -> dict[str, object]:
        arguments = LockArgs(timeoutMs=timeout_ms)
        return self._told(self._lib.cuCheckpointProcessLock(pid, ctypes.byref(arguments)))

    def checkpoint(self, pid: int) -> dict[str, object]:
        arguments = CheckpointArgs()
        return self._told(self._lib.cuCheckpointProcessCheckpoint(pid, ctypes.byref(arguments)))

    def restore(self, pid: int, pairs: Any) -> dict[str, object]:
        arguments, listed = RestoreArgs(), (GpuPair * max(1, len(pairs)))()
        for place, (old, new) in zip(listed, pairs, strict=False):
            place.oldUuid[:], place.newUuid[:] = bytes.fromhex(old), bytes.fromhex(new)
        if pairs:
            arguments.gpuPairs, arguments.gpuPairsCount = listed, len(pairs)
        return self._told(self._lib.cuCheckpointProcessRestore(pid, ctypes.byref(arguments)))

    def unlock(self, pid: int) -> dict[str, object]:
        arguments = UnlockArgs()
        return self._told(self._lib.cuCheckpointProcessUnlock(pid, ctypes.byref(arguments)))

    def _told(self, code: int) -> dict[str, object]:
        text = ctypes.c_char_p()
        self._lib.cuGetErrorName(code, ctypes.byref(text))
        return {"code": code, "name": (text.value or b"").decode() or f"CUDA error {code}"}


def _loaded() -> ctypes.CDLL:
    for name in LIBRARIES[1:]:
        if os.path.exists(name):
            return ctypes.CDLL(name)
    return ctypes.CDLL(LIBRARIES[0])


class ProcessGuard:
    """The processes that must run again whatever happens. Nobody's, as long as `pids` is empty."""

    def __init__(self) -> None:
        self.pids: list[int] = []
        self.until = 0.0
        self._lock_fd = -1

    def begin(self, request: dict[str, Any]) -> None:
        """Begin, or go on with another time. Raises OSError when the lock cannot be had: nobody
        may be touched then.
        """
        self.until = time.monotonic() + float(request["within_s"])
        if self.pids:
            return
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._lock_fd = os.open(str(request["lock"]), flags, 0o600)
        fcntl.flock(self._lock_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.write(self._lock_fd, f"{os.getpid()}\n".encode())
        self.pids = [int(pid) for pid in request["pids"]]

    def dismiss(self) -> None:
        self.pids = []
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
        self._lock_fd = -1

    def waited(self, asked: socket.socket) -> bool:
        """Wait for the next request. False when it is too late for those who are guarded."""
        daemon, stopped = os.getppid(), 0
        while not select.select([asked], [], [], _LOOK_S if self.pids else None)[0]:
            stopped = stopped + 1 if is_stopped(daemon) else 0
            if stopped >= _STOPPED_LOOKS or time.monotonic() > self.until:
                return False
        return True

    def bring_back(self, driver: CheckpointDriver) -> None:
        """Restore and unlock, as each one's state asks for. It may wait until they are thawed."""
        for pid in self.pids:
            if driver.state(pid)["state"] == "checkpointed":
                driver.restore(pid, ())
            if driver.state(pid)["state"] == "locked":
                driver.unlock(pid)


def is_stopped(pid: int) -> bool:
    """Whether somebody has stopped the process."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def main() -> int:
    """Serve until the socket ends."""
    with socket.socket(fileno=int(sys.argv[1])) as asked:
        try:
            driver = CheckpointDriver()
        except OSError as error:
            asked.send(json.dumps({"failed": str(error)}).encode())
            return 1
        guard = ProcessGuard()
        while request := _next(asked, guard):
            answer = _answered(driver, guard, request)
            try:
                asked.send(json.dumps(answer).encode())
            except OSError:
                break  # nobody hears it
    guard.bring_back(driver)
    return 0


def _next(asked: socket.socket, guard: ProcessGuard) -> dict[str, Any] | None:
    if not guard.waited(asked):
        return None
    try:
        data = asked.recv(_MOST_BYTES)
    except ConnectionError:
        return None
    return json.loads(data) if data else None


def _answered(
    driver: CheckpointDriver, guard: ProcessGuard, request: dict[str, Any]
) -> dict[str, object]:
    try:
        if request["do"] == "guard":
            guard.begin(request)
            return {"code": 0, "name": ""}
        if request["do"] == "dismiss":
            guard.dismiss()
            return {"code": 0, "name": ""}
        return driver.serve(request)
    except AttributeError as error:
        return {"failed": f"the driver is too old: {error}"}
    except (OSError, KeyError, ValueError) as error:
        return {"failed": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    sys.exit(main())
