"""Question 3: can the staging memory be read, emptied and filled again from outside; how fast."""

import os
import time
from functools import partial
from typing import Any, Final

from tests.gpu import injected, staging
from tests.gpu.children import Helper, Worker
from tests.gpu.procfs import Area, areas
from tests.gpu.scene import MIB, Scene, checkpointed
from tests.gpu.served import Served

COUNTS: Final = (1, 4, 8, 16)
LARGE: Final = "2048x2,256x14,64x8"
LARGEST: Final = "4096x5,512x18,64x16"


def rate(size: int, seconds: float) -> float:
    """GB/s."""
    return round(size / seconds / 1e9, 2)


class Staging:
    """The steps on one checkpointed process."""

    def __init__(self, scene: Scene, worker: Worker, held: list[Area]) -> None:
        self.scene, self.worker, self.held = scene, worker, held
        self.size = sum(area.size for area in held)
        self.copy = staging.Copy(self.size)

    def rates(self, way: str, *, write: bool) -> dict[str, Any]:
        """GB/s by thread count; before each write the areas are emptied."""
        found: dict[str, Any] = {}
        for threads in COUNTS:
            try:
                if write:
                    empty(self.worker.pid, self.held)
                took = staging.moved(
                    self.worker.pid, self.held, self.copy, way, threads, write=write
                )
                found[f"{threads} threads"] = rate(self.size, took)
            except OSError as error:
                return found | {"refused": str(error)}
        return found

    def emptied(self) -> dict[str, Any]:
        """How long it takes, and what is resident then."""
        before, took = self.resident(), empty(self.worker.pid, self.held)
        return {"ms": round(took * 1000, 2), "MiB before": before, "MiB after": self.resident()}

    def resident(self) -> int:
        """MiB of the areas' places."""
        places = [(area.start, area.end) for area in self.held]
        now = areas(self.worker.pid)
        return sum(a.rss for a in now for s, e in places if a.start < e and s < a.end) // MIB

    def huge(self) -> dict[str, Any]:
        """Emptied, advised to take huge pages, filled."""
        found = {}
        for threads in COUNTS:
            empty(self.worker.pid, self.held)
            injected.madvise(self.worker.pid, ranges(self.held), injected.HUGEPAGE)
            took = staging.moved(
                self.worker.pid, self.held, self.copy, "process_vm", threads, write=True
            )
            found[f"{threads} threads"] = rate(self.size, took)
        found["AnonHugePages MiB"] = (
            sum(area.sizes.get("AnonHugePages", 0) for area in areas(self.worker.pid)) // MIB
        )
        return found

    def spoil(self) -> str:
        """One octet in the middle of every 8 MiB, in the areas themselves."""
        with open(f"/proc/{self.worker.pid}/mem", "r+b", buffering=0) as memory:
            for area in self.held:
                for at in range(area.start + 4 * MIB, area.end, 8 * MIB):
                    old = os.pread(memory.fileno(), 1, at)
                    os.pwrite(memory.fileno(), bytes([old[0] ^ 0x55]), at)
        return "one octet in every 8 MiB changed"


def ranges(held: list[Area]) -> list[tuple[int, int]]:
    """Start and size."""
    return [(area.start, area.size) for area in held]


def empty(pid: int, held: list[Area]) -> float:
    """Seconds that it took to give the memory of `held` back, shared or private."""
    started = time.monotonic()
    shared = [area for area in held if area.shared]
    private = [area for area in held if not area.shared]
    if shared:
        staging.punch(pid, shared)
    if private:
        injected.madvise(pid, ranges(private), injected.DONTNEED)
    return time.monotonic() - started


def run(scene: Scene, only: tuple[str, ...]) -> None:
    """8 GiB for the rates, then 1 GiB with a changed payload: the check must see it."""
    with scene.helper() as helper:
        steps = {
            "8 GiB": rates,
            "huge pages": huge,
            "spoilt": spoilt,
            "served": served,
            "served 30 GiB": served,
        }
        for name, work in steps.items():
            if scene.wanted(name, only):
                scene.step(f"{name} end", partial(work, scene, helper, name))


def rates(scene: Scene, helper: Helper, name: str) -> dict[str, Any]:
    """Read in every way, empty, fill in every way, and all must be right."""
    with (
        scene.cuda(LARGE) as worker,
        checkpointed(scene, helper, worker) as held,
    ):
        steps = Staging(scene, worker, held)
        put = scene.step
        put(f"{name} areas", lambda: [area.shown() for area in held][:8])
        put(f"{name} read mem GB/s", lambda: steps.rates("mem", write=False))
        put(f"{name} read map_files GB/s", lambda: steps.rates("map_files", write=False))
        put(f"{name} read process_vm GB/s", lambda: steps.rates("process_vm", write=False))
        put(f"{name} emptied", steps.emptied)
        put(f"{name} write mem GB/s", lambda: steps.rates("mem", write=True))
        put(f"{name} write process_vm GB/s", lambda: steps.rates("process_vm", write=True))
        put(f"{name} resident MiB", steps.resident)
        return ended(helper, worker)


def huge(scene: Scene, helper: Helper, name: str) -> dict[str, Any]:
    """The same places with huge pages: filling, and what the driver's restore costs then."""
    with (
        scene.cuda(LARGE) as worker,
        checkpointed(scene, helper, worker) as held,
    ):
        steps = Staging(scene, worker, held)
        staging.moved(worker.pid, held, steps.copy, "process_vm", 8)
        scene.step(f"{name} write process_vm GB/s", steps.huge)
        return ended(helper, worker)


def served(scene: Scene, helper: Helper, name: str) -> dict[str, Any]:
    """Filled by userfaultfd: first before the driver's restore, then during it."""
    start = partial(scene.torch, LARGEST) if "30" in name else partial(scene.cuda, LARGE)
    found: dict[str, Any] = {}
    for way in ("before", "during"):
        with start() as worker, checkpointed(scene, helper, worker) as held:
            steps = Staging(scene, worker, held)
            staging.moved(worker.pid, held, steps.copy, "process_vm", 16)
            empty(worker.pid, held)
            began = time.monotonic()
            server = Served(worker.pid, held, steps.copy, 16)
            if way == "before":
                server.close()
            thawed = helper.thaw(worker.pid)
            took = time.monotonic() - began
            if way == "during":
                server.close()
            found[way] = {"all s": took, "fill s": server.took_s, "waits": server.waited}
            found[way] |= {**thawed, "check": worker.check()}
    return found


def spoilt(scene: Scene, helper: Helper, name: str) -> dict[str, Any]:
    """Are these areas really the payload? Then a change in them is one of the device's memory."""
    with scene.cuda("512x1,128x4") as worker, checkpointed(scene, helper, worker) as held:
        steps = Staging(scene, worker, held)
        scene.step(name, steps.spoil)
        return ended(helper, worker)


def ended(helper: Helper, worker: Worker) -> dict[str, Any]:
    """Driver restore, unlock, and the check."""
    thawed: dict[str, Any] = helper.thaw(worker.pid)
    return {**thawed, "check": worker.check()}
