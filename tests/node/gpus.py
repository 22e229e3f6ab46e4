"""A node with stand-in GPUs: what NVIDIA's driver and a device plugin make of a node and its pods.

The device files are those of CPUID and FUSE: they can be opened, and CRIU does not dump a process
that has one open, as with the real ones.
"""

import json
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from tests.gpu.standin.build import build
from tests.node.kubelet import Pod
from tests.node.node import Node
from tests.node.podspec import ContainerSpec, HostPath, VolumeMount
from tests.node.swapping import PROBE, ask, wipe_snapshots

LIBRARIES: Final = "/usr/lib/x86_64-linux-gnu"
HOME: Final = "/run/cuda-standin"
DRIVER: Final = "580.159.04"
UUIDS: Final = ("stand-in-gpu-000", "stand-in-gpu-001")
"""In octets: those of the devices with the minors 0 and 1."""
SHARED_MEMORY: Final = {
    "NCCL_P2P_DISABLE": "1", "NCCL_CUMEM_ENABLE": "0", "NCCL_CUMEM_HOST_ENABLE": "0",
}  # fmt: skip
"""The declaration of a pod with several CUDA processes about itself."""
_CPUID_MAJOR: Final = 203
_FUSE: Final = (10, 229)
MODEL: Final = "143771 0 0 NVIDIA H200"


def octets(minor: int) -> str:
    """As libcuda gives it, in hexadecimal."""
    return UUIDS[minor].encode().hex()


def uuid(minor: int) -> str:
    """As NVML writes it."""
    digits = octets(minor)
    return f"GPU-{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


@contextmanager
def gpus(node: Node, count: int = 2) -> Iterator[None]:
    """The node has GPUs inside of the `with`, and a daemon that knows them.

    Snapshots go with them.
    """
    made = build()
    paths = [f"/dev/nvidia{minor}" for minor in range(count)]
    devices = {path: (_CPUID_MAJOR, minor) for minor, path in enumerate(paths)}
    for path, numbers in {**devices, "/dev/nvidiactl": _FUSE, "/dev/nvidia-uvm": _FUSE}.items():
        os.mknod(node.path(path), stat.S_IFCHR | 0o666, os.makedev(*numbers))
        node.path(path).chmod(0o666)
    for library in ("libcuda.so.1", "libnvidia-ml.so.1"):
        shutil.copy(made / library, node.path(f"{LIBRARIES}/{library}"))
    describe(node, [f"{minor} {MODEL}" for minor in range(count)])
    node.run(["mount", "-t", "tmpfs", "tmpfs", "/proc/driver"])
    node.write("/proc/driver/nvidia/version", f"NVRM version: stand-in {DRIVER}\n")
    restart_daemon(node)
    try:
        yield
    finally:
        node.run(["umount", "/proc/driver"])
        shutil.rmtree(node.path(HOME))
        for path in [*paths, "/dev/nvidiactl", "/dev/nvidia-uvm",
                     f"{LIBRARIES}/libcuda.so.1", f"{LIBRARIES}/libnvidia-ml.so.1"]:  # fmt: skip
            node.path(path).unlink()
        wipe_snapshots(node)  # restarts the daemon, which then knows no GPU


def describe(node: Node, lines: Sequence[str]) -> None:
    """Write NVML's answers about the node: MINOR TOTAL_MIB MIG COMPUTE_MODE NAME in each line."""
    node.write(f"{HOME}/devices", "".join(f"{line}\n" for line in lines))
    node.write(f"{HOME}/driver", f"{DRIVER}\n")
    for name in ("faults", "rate"):
        node.path(f"{HOME}/{name}").mkdir(exist_ok=True)


def restart_daemon(node: Node) -> None:
    """It reads the inventory at its start."""
    node.stop_daemon()
    node.start_daemon()


@contextmanager
def fault(node: Node, call: str, what: str) -> Iterator[None]:
    """A call of the driver (`lock`, `checkpoint.once`, …) goes wrong inside of the `with`."""
    path = node.path(f"{HOME}/faults/{call}")
    path.write_text(f"{what}\n")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def gpu_probe(*minors: int, env: dict[str, str] | None = None, **fields: Any) -> ContainerSpec:
    """A container with these GPUs and the worker that uses them; `fields` are ContainerSpec's."""
    devices = [f"/dev/nvidia{minor}" for minor in minors or (0,)]
    library = f"{LIBRARIES}/libcuda.so.1"
    return ContainerSpec(
        PROBE, command=["python3", "-m", "workers.gpu"], env=env or {},
        devices=[*devices, "/dev/nvidiactl", "/dev/nvidia-uvm"],
        mounts=[VolumeMount(library, HostPath(library), read_only=True)], **fields,
    )  # fmt: skip


def checked(pod: Pod) -> dict[str, Any]:
    """Returns the worker's report on its GPUs; every word on them is right. Raises
    AssertionError.
    """
    found: dict[str, Any] = ask(pod, "/gpu")
    assert found["wrong"] == 0, found
    return found


def in_use(node: Node) -> dict[int, int]:
    """Bytes in use by minor, as nvidia-smi shows them."""
    argv = ["/usr/lib/quickthaw/bin/python3", "-ISE", "/usr/lib/quickthaw/shim/kernel/nvml.py"]
    listed = json.loads(node.run([*argv, "processes"]))["gpus"]
    return {each["minor"]: each["memory_bytes"] - each["free_bytes"] for each in listed}
