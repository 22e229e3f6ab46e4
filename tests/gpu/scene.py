"""The common scene of every part: the places of things, and the processes under test by name."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from tests.gpu import children
from tests.gpu.children import Helper, Worker
from tests.gpu.images import Criu
from tests.gpu.procfs import Area, Look, changes, grown
from tests.gpu.record import Record

MIB: Final = 1 << 20
LONG: Final = frozenset(
    {
        "cuda 90 GiB",
        "cuda 8 GiB, malloc with huge pages",
        "torch 30 GiB, huge pages always",
        "served 30 GiB",
        "torch 8 GiB hollow and lazy",
        "torch 30 GiB hollow, huge pages",
        "torch 30 GiB through CRIU",
    }
)
"""Steps that are done only when they are named, so that all others fit into nine minutes."""


@dataclass(frozen=True, slots=True)
class Scene:
    """`fake`: without a GPU. `scratch` is removed when the probe ends."""

    record: Record
    bundle: Path
    scratch: Path
    fake: bool

    @property
    def criu(self) -> Criu:
        return Criu(self.bundle)

    def helper(self, *, init: bool = True) -> Helper:
        """A new helper process."""
        return Helper(fake=self.fake, init=init)

    def cuda(self, layout: str, timeout_s: float = 60, **variables: str) -> Worker:
        """The small CUDA program with device memory of `layout`, when it is ready."""
        return Worker.start(self.cuda_argv(layout), self.scratch, timeout_s=timeout_s, **variables)

    def torch(
        self, layout: str, *features: str, timeout_s: float = 120, **variables: str
    ) -> Worker:
        """The PyTorch program, when it is ready."""
        argv = self.torch_argv(layout, *features)
        return Worker.start(argv, self.scratch, timeout_s=timeout_s, **variables)

    def cuda_argv(self, layout: str) -> list[str]:
        """With HOME where its directory goes."""
        return self._fake(layout) if self.fake else [str(self.worker()), "HOME", layout]

    def torch_argv(self, layout: str, *features: str) -> list[str]:
        """With HOME where its directory goes."""
        argv = [sys.executable, "-m", "tests.gpu.torch_worker", "HOME", layout, *features]
        return self._fake(layout) if self.fake else argv

    def _fake(self, layout: str) -> list[str]:
        mib = sum(int(e.split("x")[0]) * int((e + "x1").split("x")[1]) for e in layout.split(","))
        return [sys.executable, "-m", "tests.gpu.fake_worker", "HOME", str(min(mib, 64))]

    def worker(self) -> Path:
        """The CUDA program: the bundle's, or compiled here where that one does not run."""
        ready, made = self.bundle / "bin" / "worker", self.scratch.parent / "worker"
        if ready.exists():
            return ready
        if not made.exists():
            source = str(Path(__file__).with_name("worker.cu"))
            done = children.run(["nvcc", "-arch=sm_90", "-O2", "-o", str(made), source], 100)
            if done.returncode:
                raise RuntimeError(f"nvcc: {done.stderr[-600:]}")
        return made

    def wanted(self, name: str, only: tuple[str, ...]) -> bool:
        """Whether this step is to be done: it is named, or nothing is and it does not take long."""
        return name in only if only else name not in LONG

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """Do and record; a failure is a finding and not the end of the part. None when it failed"""
        try:
            finding = work()
        except Exception as error:  # noqa: BLE001 - the border: the next step may still tell
            self.record.put(name, {"failed": f"{type(error).__name__}: {error}"[:900]})
            return None
        if finding is not None:
            self.record.put(name, finding)
        return finding


@contextlib.contextmanager
def checkpointed(scene: Scene, helper: Helper, worker: Worker) -> Iterator[list[Area]]:
    """The worker in state checkpointed; gives its staging areas. Raises RuntimeError."""
    before = Look.at(worker.pid)
    froze = helper.freeze(worker.pid)
    if froze["state"] != "checkpointed":
        raise RuntimeError(f"not checkpointed: {froze}")
    yield staging_areas(before, Look.at(worker.pid))


def staging_areas(before: Look, after: Look) -> list[Area]:
    """Returns the present areas of the device's memory: areas that grew by a MiB or more, except
    earlier areas.
    """
    old = [area for area in before.areas if area.rss]
    return [rest for area in grown(before.areas, after.areas, MIB) for rest in without(area, old)]


def without(area: Area, old: list[Area]) -> list[Area]:
    """`area` less the places of `old`: the kernel joins neighbours that are alike."""
    found, start = [], area.start
    for each in sorted(old, key=lambda known: known.start):
        if each.start < area.end and area.start < each.end:
            if each.start > start:
                found.append(replace(area, start=start, end=each.start))
            start = max(start, each.end)
    if start < area.end:
        found.append(replace(area, start=start))
    return found


def walked(
    helper: Helper, worker: Worker, names: tuple[str, ...] = ()
) -> tuple[dict[str, Any], dict[str, Look]]:
    """All four steps with what each changed; and how the process looked after each."""
    looks, found = {"start": Look.at(worker.pid)}, {}
    last = "start"
    for name in names or ("lock", "checkpoint", "restore", "unlock"):
        more = {"timeout_ms": 20_000} if name == "lock" else {}
        answer = helper.do(name, worker.pid, **more)
        looks[name] = Look.at(worker.pid)
        state = helper.state(worker.pid)
        found[name] = {**answer, "state": state, "changed": changes(looks[last], looks[name])}
        last = name
        if answer["code"]:
            break
    return found, looks
