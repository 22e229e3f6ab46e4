"""Question 1: what the machine can do without its GPU, and how fast memory moves."""

import gzip
import mmap
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import CDLL, addressof, c_char, c_ulong, get_errno, memmove
from pathlib import Path
from typing import Any, Final

from shim.kernel import procfs
from tests.gpu import children
from tests.gpu.container import Container
from tests.gpu.scene import MIB, Scene

CONFIG: Final = (
    "CHECKPOINT_RESTORE|USERFAULTFD|CGROUPS|CGROUP_FREEZER|CGROUP_DEVICE|MEMCG|CGROUP_BPF"
    "|NAMESPACES|PID_NS|USER_NS|NET_NS|OVERLAY_FS|MEMFD_CREATE|SHMEM|FUSE_FS|IO_URING|UNIX_DIAG"
    "|INET_DIAG|PACKET_DIAG|NETLINK_DIAG|TRANSPARENT_HUGEPAGE|TRANSPARENT_HUGEPAGE_ALWAYS"
    "|TRANSPARENT_HUGEPAGE_MADVISE|HUGETLBFS|NF_TABLES|VETH|BRIDGE|SECCOMP|FS_VERITY|MEM_SOFT_DIRTY"
)
COUNTS: Final = (1, 2, 4, 8, 16)
BLOCK: Final = 64 * MIB


def facts() -> dict[str, Any]:
    """Kernel, memory, mounts, GPU."""
    devices = children.run(["nvidia-smi", "-L"], 20).stdout.strip()
    query = "--query-gpu=driver_version,name,memory.total,persistence_mode,mig.mode.current"
    return {
        "kernel": platform.release(),
        "system": children.run(["sh", "-c", ". /etc/os-release; echo $PRETTY_NAME"], 5).stdout,
        "libc": platform.libc_ver(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "gpu": children.run(["nvidia-smi", query, "--format=csv,noheader"], 20).stdout.strip(),
        "gpus": devices.count("GPU "),
        "config": config(),
        "capabilities": procfs.status("self")["CapEff"],
        "cgroups": children.run(["sh", "-c", "grep cgroup /proc/mounts"], 5).stdout.splitlines(),
        "controllers": Path("/proc/cgroups").read_text().splitlines(),
        "MemTotal": _line("/proc/meminfo", "MemTotal"),
        "thp": _text("/sys/kernel/mm/transparent_hugepage/enabled"),
        "shmem thp": _text("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        "devices": sorted(str(path) for path in Path("/dev").glob("nvidia*")),
        "tools": {name: bool(_which(name)) for name in ("ip", "iptables", "nft", "tar", "unshare")},
    }


def _line(path: str, name: str) -> str:
    found = re.search(rf"^{name}:\s*(.*)$", Path(path).read_text(), re.MULTILINE)
    return found[1] if found else "?"


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError as error:
        return str(error.strerror)


def _which(name: str) -> str:
    return children.run(["sh", "-c", f"command -v {name}"], 5).stdout.strip()


def config() -> dict[str, str] | str:
    """The options of CONFIG that the kernel was built with."""
    places = [Path("/proc/config.gz"), Path(f"/boot/config-{platform.release()}")]
    for place in places:
        if place.exists():
            data = place.read_bytes()
            text = (gzip.decompress(data) if place.suffix == ".gz" else data).decode()
            return dict(re.findall(rf"^CONFIG_({CONFIG})=(.*)$", text, re.MULTILINE))
    return "no file says"


def fresh(size: int) -> mmap.mmap:
    """Memory that nothing has touched."""
    return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def at_once(threads: int, work: Callable[[int], None], blocks: int) -> float:
    """`work` for each block; returns GB/s of BLOCK each."""
    with ThreadPoolExecutor(threads) as pool:
        started = time.monotonic()
        list(pool.map(work, range(blocks)))
        return round(blocks * BLOCK / (time.monotonic() - started) / 1e9, 2)


def copying(gib: int) -> dict[str, dict[int, float]]:
    """GB/s by thread count: first touch of anonymous memory, then copies of resident memory."""
    blocks = gib * (1 << 30) // BLOCK
    found: dict[str, dict[int, float]] = {"first touch": {}, "copy": {}}
    for threads in COUNTS:
        source, target = fresh(gib << 30), fresh(gib << 30)
        ends = [addressof(c_char.from_buffer(each)) for each in (target, source)]
        zeros = bytes(BLOCK)

        def touch(index: int, at: int = ends[1], zeros: bytes = zeros) -> None:
            memmove(at + index * BLOCK, zeros, BLOCK)

        def copy(index: int, ends: list[int] = ends) -> None:
            memmove(ends[0] + index * BLOCK, ends[1] + index * BLOCK, BLOCK)

        found["first touch"][threads] = at_once(threads, touch, blocks)
        at_once(threads, copy, blocks)
        found["copy"][threads] = at_once(threads, copy, blocks)
    return found


def page_cache(scratch: Path, gib: int) -> dict[str, Any]:
    """Write one file, then read it from the page cache: GB/s by thread count."""
    path, zeros = scratch / "cached", os.urandom(BLOCK)
    blocks = gib * (1 << 30) // BLOCK
    started = time.monotonic()
    with path.open("wb") as file:
        for _ in range(blocks):
            file.write(zeros)
    found: dict[str, Any] = {"write GB/s": round(gib * 1.0737 / (time.monotonic() - started), 2)}
    room = fresh(BLOCK * blocks)
    view, fd = memoryview(room), os.open(path, os.O_RDONLY)

    def read(index: int) -> None:
        os.preadv(fd, [view[index * BLOCK : (index + 1) * BLOCK]], index * BLOCK)

    at_once(4, read, blocks)  # so that the room is resident
    for threads in COUNTS:
        found[f"read GB/s, {threads} threads"] = at_once(threads, read, blocks)
    os.close(fd)
    path.unlink()
    return found


TRANSFERS: Final = """
import json, time, torch
size = 2 << 30
device = torch.empty(size, dtype=torch.uint8, device="cuda")
found = {}
for kind in ("pinned", "pageable"):
    started = time.monotonic()
    host = torch.ones(size, dtype=torch.uint8, pin_memory=kind == "pinned")
    found[kind + " made s"] = round(time.monotonic() - started, 3)
    for name, to, source in (("to device", device, host), ("to host", host, device)):
        rates = []
        for _ in range(4):
            torch.cuda.synchronize()
            started = time.monotonic()
            to.copy_(source)
            torch.cuda.synchronize()
            rates.append(round(size / (time.monotonic() - started) / 1e9, 2))
        found[f"{kind} {name} GB/s"] = rates
print(json.dumps(found))
"""


def transfers() -> dict[str, str]:
    """Host to device and back through PyTorch, one stream."""
    done = children.run([sys.executable, "-c", TRANSFERS], 90, env=children.environment())
    return {"said": done.stdout.strip(), "wrong": done.stderr[-400:]}


def cpu_container(scene: Scene) -> dict[str, Any]:
    """runc run, checkpoint, restore of a process that uses no GPU."""
    container = Container(scene.bundle, scene.scratch, "cpu")
    try:
        argv = [sys.executable, "-m", "tests.gpu.fake_worker", "HOME", "256"]
        worker = container.start(argv, timeout_s=30)
        found = {"check": worker.check(), "checkpoint": container.checkpoint()}
        found["restore"], again = container.restore(worker)
        return {**found, "check then": again.check()}
    finally:
        container.end()


def remote_advice() -> dict[str, str]:
    """process_madvise(2) on another process: what the kernel says to giving memory back."""
    libc, found = CDLL(None, use_errno=True), {}
    with children.background(["sleep", "20"]) as child:
        pidfd = os.pidfd_open(child.pid)
        start, end = next(procfs.areas(child.pid, b" rw-p ")).range
        for name, advice in (("DONTNEED", 4), ("HUGEPAGE", 14), ("COLD", 20), ("POPULATE", 23)):
            vector = (c_ulong * 2)(start, end - start)
            done = libc.syscall(440, pidfd, vector, c_ulong(1), c_ulong(advice), c_ulong(0))
            found[name] = "taken" if done >= 0 else os.strerror(get_errno())
        os.close(pidfd)
        child.kill()
    return found


def run(scene: Scene, only: tuple[str, ...]) -> None:
    """`only`: which of the steps."""
    gib = 1 if scene.fake else 4
    steps: dict[str, Callable[[], Any]] = {
        "facts": facts,
        "criu": scene.criu.check,
        "runc, CPU container": lambda: cpu_container(scene),
        "process_madvise": remote_advice,
        "memory GB/s": lambda: copying(gib),
        "page cache": lambda: page_cache(scene.scratch, gib),
        "transfers": lambda: "not without a GPU" if scene.fake else transfers(),
    }
    for name, work in steps.items():
        if scene.wanted(name, only):
            scene.step(name, work)
