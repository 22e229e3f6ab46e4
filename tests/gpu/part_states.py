"""Question 2: what lock, checkpoint, restore and unlock cost, and do to the process."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tests.gpu import children
from tests.gpu.children import Helper, Worker
from tests.gpu.procfs import Look
from tests.gpu.scene import MIB, Scene, staging_areas, walked

EIGHT = "2048x2,256x14,64x8"
THIRTY = "4096x5,512x18,64x16"
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE = "glibc.malloc.hugetlb=1"
ROUNDS = 2
"""The first may pay for host memory that was never used before."""


def device_used_mib() -> int | str:
    """Of the first GPU, all processes together."""
    words = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    said = children.run(words, 20).stdout.strip()
    return int(said.splitlines()[0]) if said else "no nvidia-smi"


def host_mib() -> dict[str, int]:
    """Returns the figures of /proc/meminfo that matter here, in MiB."""
    with open("/proc/meminfo") as file:
        known = {line.split(":")[0]: int(line.split()[1]) // 1024 for line in file}
    return {name: known[name] for name in ("MemTotal", "MemAvailable", "Shmem", "Cached")}


def rounds(scene: Scene, helper: Helper, name: str, worker: Worker) -> None:
    """Two rounds of the four steps, the first in all detail."""
    put = scene.record.put
    put(f"{name}: ready", worker.ready)
    put(f"{name}: look", described(Look.at(worker.pid)))
    thread = helper.do("thread", worker.pid)
    known = Look.at(worker.pid).threads
    put(f"{name}: restore thread", {**thread, "is": known.get(thread.get("tid", 0))})
    for number in range(1, ROUNDS + 1):
        used = {"running": device_used_mib()}
        first, looks = walked(helper, worker, ("lock", "checkpoint"))
        used["checkpointed"] = device_used_mib()
        second, _ = walked(helper, worker, ("restore", "unlock"))
        used["again"] = device_used_mib()
        steps = {**first, **second}
        put(f"{name}: round {number} ms", {step: each["ms"] for step, each in steps.items()})
        states = {step: (each["name"], each["state"]) for step, each in steps.items()}
        put(f"{name}: round {number} states", states)
        put(f"{name}: round {number} device MiB", used)
        if number == 1:
            put(f"{name}: changes", {step: each["changed"] for step, each in steps.items()})
            areas = staging_areas(looks["start"], looks["checkpoint"]) if len(looks) > 2 else []
            put(f"{name}: staging", staged(areas))
        put(f"{name}: round {number} check", worker.check())
    put(f"{name}: host MiB", host_mib())


def described(look: Look) -> dict[str, Any]:
    """A running process."""
    return {
        "areas": len(look.areas),
        "resident MiB": look.totals(),
        "devices": look.devices(),
        "sockets": sockets(),
        "descriptors": sorted(set(look.descriptors.values()))[:60],
        "threads": sorted(look.threads.values()),
    }


def staged(areas: list[Any]) -> dict[str, Any]:
    """The staging areas: how many, how large, some of them in full."""
    largest = sorted(areas, key=lambda area: -area.size)
    return {
        "areas": len(areas),
        "bytes": sum(area.size for area in areas),
        "resident": sum(area.rss for area in areas),
        "shared bytes": sum(area.size for area in areas if area.shared),
        "inodes": len({area.inode for area in areas}),
        "largest": [area.shown() for area in largest[:12]],
        "sizes MiB": sorted((round(area.size / MIB, 2) for area in areas), reverse=True)[:100],
    }


def run(scene: Scene, only: tuple[str, ...]) -> None:
    """`only`: which of the workers."""
    every: dict[str, Callable[[], Worker]] = {
        "cuda 1 GiB": lambda: scene.cuda("512x1,128x3,32x4"),
        "torch 1 GiB": lambda: scene.torch("512x1,128x3,32x4"),
        "torch 8 GiB": lambda: scene.torch(EIGHT),
        "torch 30 GiB": lambda: scene.torch(THIRTY),
        "cuda 90 GiB": lambda: scene.cuda("4096x20,512x20"),
        "cuda 8 GiB": lambda: scene.cuda(EIGHT),
        "cuda 8 GiB, malloc with huge pages": lambda: scene.cuda(EIGHT, GLIBC_TUNABLES=HUGE),
        "cuda 8 GiB, huge pages always": lambda: scene.cuda(EIGHT),
        "torch 30 GiB, huge pages always": lambda: scene.torch(THIRTY),
    }
    with scene.helper() as helper:
        scene.record.put("helper", {"start_ms": helper.start_ms, "init": helper.init})
        scene.record.put("driver version", helper.started)
        for name, start in every.items():
            if scene.wanted(name, only):
                scene.step(name, partial(_one, scene, helper, name, start))
    if scene.wanted("two at once", only):
        scene.step("two at once", partial(at_once, scene))


def _one(scene: Scene, helper: Helper, name: str, start: Callable[[], Worker]) -> None:
    always = name.endswith("always") and not scene.fake  # a setting of the whole machine
    with huge_pages("always" if always else ""), start() as worker:
        rounds(scene, helper, name, worker)


@contextmanager
def huge_pages(mode: str) -> Iterator[None]:
    """The kernel's setting meanwhile; nothing for an empty one."""
    before = HUGE_PAGES.read_text().partition("[")[2].partition("]")[0]
    try:
        if mode:
            HUGE_PAGES.write_text(mode)
        yield
    finally:
        if mode:
            HUGE_PAGES.write_text(before)


def at_once(scene: Scene) -> dict[str, Any]:
    """Two processes, each with a helper, at the same time: seconds of each and together."""
    found: dict[str, Any] = {}
    with scene.cuda(EIGHT) as one, scene.cuda(EIGHT) as two, ThreadPoolExecutor(2) as pool:
        with scene.helper() as first, scene.helper() as second:
            pairs = ((first, one), (second, two))
            for name, call in (("freeze", Helper.freeze), ("thaw", Helper.thaw)):
                started = time.monotonic()
                answers = [pool.submit(call, helper, worker.pid) for helper, worker in pairs]
                found[name] = [answer.result() for answer in answers]
                found[f"{name} s"] = round(time.monotonic() - started, 3)
        return {**found, "check": [one.check(), two.check()]}


def sockets() -> list[str]:
    """Unix sockets of the driver: type and name."""
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    return [" ".join(line.split()[4:]) for line in lines if "cuda" in line]
