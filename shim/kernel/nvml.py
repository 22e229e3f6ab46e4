"""Lists the GPUs of this node, through the driver's own library.

A program of its own, because initialising the library can take seconds or hang: it prints a JSON
object, `{"driver", "gpus": [{"minor", "uuid", "name", "memory_bytes", "mig", "exclusive"}]}`, or
exits with status 1 and the reason. A node without the driver has an empty list. With the argument
`processes` each GPU has also `free_bytes` and `processes`, an object with the bytes that each
process uses, by its pid. Standard library only. Source: NVML API reference, nvmlInit_v2,
nvmlDeviceGet*, nvmlSystemGetDriverVersion.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DRIVER = "/proc/driver/nvidia/version"
_LIBRARY = "libnvidia-ml.so.1"
_NOT_SUPPORTED = 3
_NAME_BYTES = 96
_SHARED = 0
"""Compute mode: several processes may have a context."""
_PROCESSES = 1024
_NOT_AVAILABLE = (1 << 64) - 1


class NvmlFailed(Exception):
    """A call of the library failed. The message has the call and NVML's status."""


def inventory(*, with_processes: bool = False) -> dict[str, object]:
    """Returns the driver's version and every GPU. Raises NvmlFailed, OSError."""
    if not os.path.exists(DRIVER):
        return {"driver": "", "gpus": []}
    library = ctypes.CDLL(_LIBRARY)
    _call(library, "nvmlInit_v2")
    try:
        count = ctypes.c_uint()
        _call(library, "nvmlDeviceGetCount_v2", ctypes.byref(count))
        gpus = [_gpu(library, index, with_processes) for index in range(count.value)]
        return {"driver": _text(library, "nvmlSystemGetDriverVersion"), "gpus": gpus}
    finally:
        library.nvmlShutdown()


def _gpu(library: ctypes.CDLL, index: int, with_processes: bool) -> dict[str, object]:
    device, minor = ctypes.c_void_p(), ctypes.c_uint()
    memory = (ctypes.c_ulonglong * 3)()  # total, free, used
    _call(library, "nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(device))
    _call(library, "nvmlDeviceGetMinorNumber", device, ctypes.byref(minor))
    _call(library, "nvmlDeviceGetMemoryInfo", device, ctypes.byref(memory))
    mode = ctypes.c_uint()
    _call(library, "nvmlDeviceGetComputeMode", device, ctypes.byref(mode))
    found: dict[str, object] = {
        "minor": minor.value, "uuid": _text(library, "nvmlDeviceGetUUID", device),
        "name": _text(library, "nvmlDeviceGetName", device),
        "memory_bytes": memory[0], "mig": _mig(library, device), "exclusive": mode.value != _SHARED,
    }  # fmt: skip
    if with_processes:
        found["free_bytes"] = memory[1]
        found["processes"] = _processes(library, device)
    return found


class _Process(ctypes.Structure):
    """nvmlProcessInfo_t of version 3."""


_Process._fields_ = [
    ("pid", ctypes.c_uint),
    ("bytes", ctypes.c_ulonglong),
    ("gpu_instance", ctypes.c_uint),
    ("compute_instance", ctypes.c_uint),
]


def _processes(library: ctypes.CDLL, device: ctypes.c_void_p) -> dict[str, int]:
    """Bytes by pid of those with a context. A driver that does not tell the bytes says 0 here."""
    count = ctypes.c_uint(_PROCESSES)
    listed = (_Process * _PROCESSES)()
    _call(library, "nvmlDeviceGetComputeRunningProcesses_v3", device, ctypes.byref(count), listed)
    return {
        str(each.pid): 0 if each.bytes == _NOT_AVAILABLE else each.bytes
        for each in listed[: count.value]
    }


def _mig(library: ctypes.CDLL, device: ctypes.c_void_p) -> bool:
    """Whether the GPU is split, or will be after its next reset."""
    current, pending = ctypes.c_uint(), ctypes.c_uint()
    status = library.nvmlDeviceGetMigMode(device, ctypes.byref(current), ctypes.byref(pending))
    if status == _NOT_SUPPORTED:
        return False
    if status:
        raise NvmlFailed(f"nvmlDeviceGetMigMode: status {status}")
    return bool(current.value or pending.value)


def _text(library: ctypes.CDLL, name: str, *first: Any) -> str:
    buffer = ctypes.create_string_buffer(_NAME_BYTES)
    _call(library, name, *first, buffer, ctypes.c_uint(_NAME_BYTES))
    return buffer.value.decode(errors="replace")


def _call(library: ctypes.CDLL, name: str, *arguments: Any) -> None:
    if status := getattr(library, name)(*arguments):
        raise NvmlFailed(f"{name}: status {status}")


if __name__ == "__main__":
    try:
        json.dump(inventory(with_processes="processes" in sys.argv[1:]), sys.stdout)
    except (NvmlFailed, OSError, AttributeError) as failure:
        sys.exit(f"{type(failure).__name__}: {failure}")
