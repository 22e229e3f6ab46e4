"""Looks at a running container and its GPUs from outside, for `shim.gpu.support`. Blocking."""

from __future__ import annotations

import contextlib
import resource

from shim.gpu import processes
from shim.gpu.support import Look, Process
from shim.kernel import procfs
from shim.kernel.cgroup import memory_room
from shim.kernel.meminfo import available_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from shim.gpu.way import Way

    Gpu = Mapping[str, object]

_MPS = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE")
_MPS_DAEMON = b"nvidia-cuda-mps"


def look(
    *,
    init: int,
    listed: Iterable[int],
    cuda: Sequence[int],
    gpus: Sequence[Gpu] | None,
    driver: str,
    host_network: bool,
    way: Way,
) -> Look:
    """Returns all that can be seen. Raises OSError, ValueError when the container has ended.

    init: of the container. listed: its processes. cuda: those of them that the driver knows. gpus:
    the container's, as of `shim.kernel.nvml` with processes; None when they are not known.
    """
    return Look(
        driver=driver, gpus=gpus, host_network=host_network,
        processes=[_process(pid, gpus or (), way) for pid in cuda],
        others=[
            f"process {pid} has {', '.join(found)} open"
            for pid in listed
            if pid not in cuda and (found := processes.open_devices(pid))
        ],
        mps=_mps([init, *cuda]), cgroup_room=memory_room(init), host_room=available_bytes(),
    )  # fmt: skip


def _process(pid: int, gpus: Sequence[Gpu], way: Way) -> Process:
    used: dict[str, int] = {}
    for gpu in gpus:
        listed = gpu.get("processes")
        if isinstance(listed, dict) and str(pid) in listed:
            # What the driver does not tell is at most all that is in use on this GPU.
            total, free = gpu.get("memory_bytes"), gpu.get("free_bytes")
            most = total - free if isinstance(total, int) and isinstance(free, int) else 0
            used[str(gpu.get("uuid"))] = int(listed[str(pid)]) or most
    asked = way.asked(pid)
    return Process(
        pid=pid, gpus=used, environment=processes.environment(pid), address_room=_address_room(pid),
        known=None if asked is None else asked.against, moved=asked.moved if asked else 0,
    )  # fmt: skip


def _address_room(pid: int) -> int | None:
    limit, _ = resource.prlimit(pid, resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    with open(f"/proc/{pid}/statm") as file:
        return max(0, limit - int(file.read().split()[0]) * resource.getpagesize())


def _mps(pids: Iterable[int]) -> list[str]:
    found = []
    for pid in dict.fromkeys(pids):
        found += [f"{name} is set for process {pid}"
                  for name in processes.environment(pid) if name in _MPS]  # fmt: skip
    for pid in procfs.pids():
        with contextlib.suppress(OSError):
            if procfs.comm(pid).startswith(_MPS_DAEMON):
                found.append(f"process {pid} of the node is an MPS daemon")
    return found
