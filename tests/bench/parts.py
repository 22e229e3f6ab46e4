"""The parts of the bench, in order, on one node."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from tests.bench import ground as grounds
from tests.bench import limits, storming, workers
from tests.bench.many import AtOnce
from tests.bench.podman import Podman
from tests.bench.result import Results
from tests.bench.sources import Sources
from tests.bench.starting import Starting
from tests.bench.turns import turns
from tests.bench.ways import Cold, Quickthaw, Stock, Way
from tests.demo.story import machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tests.bench.ground import Ground
    from tests.bench.plan import Plan
    from tests.bench.workers import Worker

SHARED_GIB: Final = 2.0
MANY_GIB: Final = 0.25
UNCACHED_GIB: Final = 4.0
LARGE_GIB: Final = 4.0
"""The memory worker whose latencies are a target, and whose fill is compared with the limit."""
NEEDS: Final = 3
"""Source, replica and page cache: how often a worker's memory is there at a time."""


@dataclass
class Bench:
    """A run of `plan`; what it finds is in `results`, also when it does not come to its end.

    after: called after each part, so that what was measured is not lost.
    """

    plan: Plan
    results: Results
    tell: Callable[[str], None]
    after: Callable[[], None]
    facts: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Every part that the plan names; one that fails does not keep others from being run."""
        parts: Mapping[str, Callable[[Ground], None]] = {
            "limit": self._limit,
            "memory": self._memory,
            "growth": self._growth,
            "shared": self._shared,
            "embedding": lambda ground: self._server(ground, workers.embedding()),
            "inference": lambda ground: self._server(ground, workers.inference()),
            "many": self._many,
            "uncached": self._uncached,
            "contents": self._contents,
        }
        chosen = [name for name in self.plan.parts if name in parts]
        if chosen:
            self.tell("Making a node")
            with grounds.ground(podman="podman" in self.plan.ways) as ground:
                self.facts = machine(ground.node)
                for name in chosen:
                    with self._told(name):
                        parts[name](ground)
        if "storm" in self.plan.parts:
            with self._told("storm"):
                storming.run(self.plan.storm_s, self.results, self.tell)

    @contextlib.contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """A failure is written down: what comes after it is worth being measured."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  whatever it is, it is told and makes us fail
            self.failed.append(f"{name}: {type(error).__name__}: {error}")
            self.tell(f"[red]{name}: {type(error).__name__}: {str(error)[-3000:]}[/red]")
        finally:
            self.after()

    def _ways(self, ground: Ground) -> Mapping[str, Way]:
        every = (Cold(ground), Stock(ground), Podman(ground), Quickthaw(ground))
        return {way.name: way for way in every if way.name in self.plan.ways}

    def _limit(self, ground: Ground) -> None:
        largest = max(self.plan.sizes)
        touched = limits.touch(int(largest * NEEDS * workers.GIB))
        self.tell(f"limit: touched {touched >> 20} MiB beforehand")
        length = int(min(largest, 4.0) * workers.GIB)
        limits.measure(ground.store(""), length, self.plan.runs, self.results, self.tell)

    def _memory(self, ground: Ground) -> None:
        for size in self.plan.sizes:
            worker = workers.memory(size, "random")
            is_large = size == LARGE_GIB
            self._rounds(ground, "memory", worker, long=is_large, limit=is_large)
            self.after()

    def _growth(self, ground: Ground) -> None:
        """The smallest and the largest worker by turns, both from snapshots that are there, and on
        a machine that has just done the same.
        """
        sizes = self.plan.sizes
        extremes = [workers.memory(size, "random") for size in (min(sizes), max(sizes))]
        pair = {worker.name: worker for worker in extremes}
        way = Quickthaw(ground)
        unused = Results()  # the part `memory` tells what captures take
        sources = Sources(ground, {way.name: way}, unused, 1, warm_s=0.0, keep=True)
        said = {}
        try:
            for name, worker in pair.items():
                limits.touch(worker.bytes * NEEDS)
                said[name] = sources.make(worker)
            most = extremes[-1].bytes
            starting = Starting(ground, {way.name: way}, self.results, self.tell, as_bytes=most)
            for number in range(self.plan.runs):
                for name in turns(list(pair), number):
                    starting.rounds("growth", pair[name], said[name], runs=1, steady_s=0.0)
        finally:
            ground.node.kubelet.remove_pods()
            sources.forget()

    def _contents(self, ground: Ground) -> None:
        # What is in memory makes a difference where memory is restored.
        for size in self.plan.sizes:
            for content in self.plan.contents:
                worker = workers.memory(size, content)
                self._rounds(ground, "memory", worker, ways=("stock", "quickthaw"), captures=1)
                self.after()

    def _shared(self, ground: Ground) -> None:
        for backing in workers.BACKINGS:
            worker = workers.shared(SHARED_GIB, backing)
            self._rounds(ground, "shared", worker, ways=("stock", "quickthaw"))

    def _server(self, ground: Ground, worker: Worker) -> None:
        # The first of a snapshot takes longer, and of few it would count as one of few.
        self._rounds(ground, worker.name, worker, long=True, runs=2 * self.plan.runs - 1)

    def _uncached(self, ground: Ground) -> None:
        worker = workers.memory(min(UNCACHED_GIB, max(self.plan.sizes)), "random")
        self._rounds(ground, "uncached", worker, uncached=True, captures=1)

    def _rounds(
        self,
        ground: Ground,
        part: str,
        worker: Worker,
        *,
        ways: tuple[str, ...] | None = None,
        long: bool = False,
        uncached: bool = False,
        runs: int | None = None,
        captures: int | None = None,
        limit: bool = False,
    ) -> None:
        """Sources, then replicas. runs, captures: else the plan's. long: others are asked as long
        as the plan says. limit: see `Starting.rounds`.
        """
        chosen = {
            name: way for name, way in self._ways(ground).items() if ways is None or name in ways
        }
        limits.touch(worker.bytes * NEEDS)
        # What captures take, and what a warm source is like, the part `memory` tells.
        found = Results() if uncached else self.results
        sources = Sources(ground, chosen, found, captures or self.plan.runs)
        steady_s = self.plan.steady_s if long else 0.0
        try:
            said = sources.make(worker)
            self.tell(f"{part}: {worker.name} was captured")
            Starting(ground, chosen, self.results, self.tell).rounds(
                part, worker, said, runs=runs or self.plan.runs, steady_s=steady_s,
                uncached=uncached, limit=limit,
            )  # fmt: skip
        finally:
            ground.node.kubelet.remove_pods()
            sources.forget()

    def _many(self, ground: Ground) -> None:
        worker, chosen = workers.memory(MANY_GIB, "random"), self._ways(ground)
        limits.touch(int(worker.bytes * max(self.plan.many) * 1.5))
        sources = Sources(ground, chosen, self.results, 1)
        try:
            sources.make(worker)
            AtOnce(ground, chosen, self.results, self.tell).rounds(
                worker, self.plan.many, self.plan.runs
            )
        finally:
            ground.node.kubelet.remove_pods()
            sources.forget()
