"""Runs the parts of the bench, in order, on a single node."""

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
"""Source, replica and page cache: the number of copies of a worker's memory at a time."""


@dataclass
class Bench:
    """A run of `plan`; its figures are in `results`, also when the run does not come to its end.

    after: called after each part, so that no figure is lost.
    """

    plan: Plan
    results: Results
    tell: Callable[[str], None]
    after: Callable[[], None]
    facts: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Run every part of the plan; a part that fails does not keep the others from running."""
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
        """Record a failure and go on: the parts that follow are worth being measured."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 any error is reported, and makes the bench fail
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
        """Measure the smallest and the largest worker by turns, from existing snapshots.

        Each start follows a start of the other worker on the same machine.
        """
        sizes = self.plan.sizes
        extremes = [workers.memory(size, "random") for size in (min(sizes), max(sizes))]
        pair = {worker.name: worker for worker in extremes}
        way = Quickthaw(ground)
        unused = Results()  # the part `memory` reports the captures
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
        # Content makes a difference where memory is restored.
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
        # The first restore of a snapshot takes longer; in a small number of runs it would weigh too
        # much.
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
        """Make sources, then start replicas. runs, captures: the plan's when None.

        long: ask other replicas as long as the plan says. limit: see `Starting.rounds`.
        """
        chosen = {
            name: way for name, way in self._ways(ground).items() if ways is None or name in ways
        }
        limits.touch(worker.bytes * NEEDS)
        # The part `memory` reports captures and warm sources.
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
