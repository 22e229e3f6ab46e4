"""Question 4: does stock CRIU dump and restore the checkpointed process; hollow too, and lazily."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from tests.gpu import children, injected, part_staging, staging
from tests.gpu.children import Helper, Worker
from tests.gpu.images import temporary
from tests.gpu.procfs import Area, areas
from tests.gpu.scene import Scene, checkpointed

THREADS: Final = 16
LADDER: Final = (
    (),
    ("--ext-unix-sk",),
    ("--ext-unix-sk", "--link-remap", "--ghost-limit", "1G", "--tcp-established", "--file-locks"),
)
"""Options that are added until a dump works."""


@dataclass(frozen=True, slots=True)
class Way:
    """How one trip through CRIU goes."""

    hollow: bool = False
    leave_running: bool = False
    lazy: bool = False
    huge: bool = False
    twice: bool = False


def run(scene: Scene, only: tuple[str, ...]) -> None:
    """Small process first, then a PyTorch one."""
    small, large, huge = "512x1,128x3,32x4", "2048x2,256x14,64x8", "4096x5,512x18,64x16"
    trips: dict[str, tuple[Callable[[], Worker], Way]] = {
        "cuda 1 GiB": (lambda: scene.cuda(small), Way()),
        "cuda 1 GiB twice": (lambda: scene.cuda(small), Way(twice=True)),
        "cuda 1 GiB hollow": (lambda: scene.cuda(small), Way(hollow=True)),
        "cuda 1 GiB hollow, source goes on": (
            lambda: scene.cuda(small),
            Way(hollow=True, leave_running=True),
        ),
        "cuda 1 GiB lazy": (lambda: scene.cuda(small), Way(lazy=True)),
        "torch 1 GiB": (lambda: scene.torch(small), Way()),
        "torch 8 GiB hollow": (lambda: scene.torch(large), Way(hollow=True)),
        "torch 8 GiB hollow, huge pages": (
            lambda: scene.torch(large),
            Way(hollow=True, huge=True),
        ),
        "torch 30 GiB through CRIU": (lambda: scene.torch(huge), Way()),
        "torch 30 GiB hollow, huge pages": (
            lambda: scene.torch(huge),
            Way(hollow=True, huge=True),
        ),
        "torch 8 GiB": (lambda: scene.torch(large), Way()),
        "torch 8 GiB hollow and lazy": (lambda: scene.torch(large), Way(hollow=True, lazy=True)),
    }
    with scene.helper() as helper:
        for name, (start, way) in trips.items():
            if scene.wanted(name, only):
                trip = Trip(scene, helper, name, way)
                scene.step(f"{name}: trip", partial(trip.go, start))
        if scene.wanted("not checkpointed", only):
            scene.step("not checkpointed", partial(refused, scene, helper))


class Trip:
    """Checkpoint, dump, restore, driver restore, and is everything right."""

    def __init__(self, scene: Scene, helper: Helper, name: str, way: Way) -> None:
        self.scene, self.helper, self.name, self.way = scene, helper, name, way
        self.found: dict[str, Any] = {}
        self.copy: staging.Copy | None = None

    def put(self, what: str, finding: Any) -> None:
        self.scene.record.put(f"{self.name}: {what}", finding)

    def go(self, start: Callable[[], Worker]) -> dict[str, Any]:
        """Returns the seconds of each step."""
        with (
            temporary(self.scene.scratch / "images") as images,
            start() as worker,
            checkpointed(self.scene, self.helper, worker) as held,
        ):
            if self.way.hollow:
                self.hollow(worker.pid, held)
            options = self.dump(worker, images)
            if options is None:
                return {"dumped": False}
            if self.way.leave_running:
                self.go_on("source", worker, held)
                worker.kill()
            worker.reap()
            self.restore(worker, images, held, options)
        return {"s": self.found}

    def hollow(self, pid: int, held: list[Area]) -> None:
        """Copy the staging areas out and empty them."""
        self.copy = staging.Copy(sum(area.size for area in held))
        self.found["copy out"] = staging.moved(pid, held, self.copy, "process_vm", THREADS)
        self.found["empty"] = part_staging.empty(pid, held)
        if self.way.huge:  # an area's advice is part of what CRIU dumps and restores
            injected.madvise(pid, part_staging.ranges(held), injected.HUGEPAGE)

    def dump(self, worker: Worker, images: Path) -> tuple[str, ...] | None:
        """The options with which it worked; None when it did not."""
        more = ("--leave-running",) if self.way.leave_running else ()
        for options in LADDER:
            done = self.scene.criu.dump(worker.pid, images, *options, *more)
            self.put(f"dump {' '.join((*options, *more))}".strip(), done)
            if done["ok"]:
                self.found["dump"] = done["s"]
                return options
            if not worker.alive():
                break
        return None

    def restore(
        self, worker: Worker, images: Path, held: list[Area], options: tuple[str, ...]
    ) -> None:
        """CRIU, then the driver."""
        server = self.page_server(images) if self.way.lazy else None
        more = ("--lazy-pages",) if self.way.lazy else ()
        done = self.scene.criu.restore(images, *options, *more)
        self.put("restore", done)
        if done["ok"]:
            self.found["criu restore"] = done["s"]
            with worker.restored(done["pid"]) as again:
                self.go_on("restored", again, held)
                if self.way.twice:
                    self.again(again, images)
        if server is not None:
            server.kill()
            self.put("page server", {"rc": server.wait(10)})

    def again(self, worker: Worker, images: Path) -> None:
        """A process that was restored is captured and restored once more."""
        self.put("second: frozen", self.helper.freeze(worker.pid))
        done = self.scene.criu.dump(worker.pid, images / "second")
        self.put("second: dump", done)
        if done["ok"]:
            worker.await_end()
            done = self.scene.criu.restore(images / "second")
            self.put("second: restore", done)
        if done["ok"]:
            self.put("second: driver", self.helper.thaw(done["pid"]))
            self.put("second: check", worker.restored(done["pid"]).check())

    def page_server(self, images: Path) -> Any:
        """CRIU's own, serving these images."""
        words = [self.scene.criu.program, "lazy-pages", "-D", str(images), "-o", "lazy.log", "-v4"]
        server = children.background(words)
        until = time.monotonic() + 10
        while not (images / "lazy-pages.socket").exists() and time.monotonic() < until:
            time.sleep(children.POLL_S)
        return server

    def go_on(self, who: str, worker: Worker, held: list[Area]) -> None:
        """Fill the staging areas again when they are empty, then let the driver restore."""
        started = time.monotonic()
        self.put(f"{who}: state", self.helper.state(worker.pid))
        if self.copy is not None:
            self.put(f"{who}: areas there", there(worker.pid, held))
            self.found[f"{who}: refill"] = staging.moved(
                worker.pid, held, self.copy, "process_vm", THREADS, write=True
            )
        thawed = self.helper.thaw(worker.pid)
        self.found[f"{who}: until unlocked"] = time.monotonic() - started
        self.put(f"{who}: driver", thawed)
        self.put(f"{who}: check", worker.check())


def refused(scene: Scene, helper: Helper) -> dict[str, Any]:
    """Returns CRIU's answers for a process that the driver has not checkpointed: running, then
    locked.
    """
    with scene.cuda("512") as worker, temporary(scene.scratch / "images") as images:
        found = {"running": scene.criu.dump(worker.pid, images, "--leave-running")}
        helper.do("lock", worker.pid, timeout_ms=5000)
        found["locked"] = scene.criu.dump(worker.pid, images, "--leave-running")
        helper.do("unlock", worker.pid)
        return {**found, "check": worker.check()}


def there(pid: int, held: list[Area]) -> dict[str, Any]:
    """Whether the places of `held` are mapped in `pid`, and what is resident in them."""
    now = areas(pid)
    covering = [[a for a in now if a.start < h.end and h.start < a.end] for h in held]
    mapped = sum(min(a.end, h.end) - max(a.start, h.start)
                 for h, some in zip(held, covering, strict=True) for a in some)  # fmt: skip
    return {
        "mapped": mapped == sum(area.size for area in held),
        "rss": sum(a.rss for some in covering for a in some),
        "flags": sorted({a.flags for some in covering for a in some}),
    }
