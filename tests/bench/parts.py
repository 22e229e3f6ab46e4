"""The parts of the bench, in order, on one node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.bench import ground as grounds
from tests.bench import workers
from tests.bench.podman import Podman
from tests.bench.sources import WARM_S, Sources
from tests.bench.starting import Starting
from tests.bench.ways import Cold, Quickthaw, Stock, Way

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.bench.ground import Ground
    from tests.bench.plan import Plan
    from tests.bench.result import Results


@dataclass
class Bench:
    """A run of `plan`; what it finds is in `results`, also when it does not come to its end."""

    plan: Plan
    results: Results
    tell: Callable[[str], None]

    def run(self) -> None:
        """Every part that the plan names."""
        self.tell("Making a node")
        with grounds.ground() as ground:
            for size in self.plan.sizes:
                self.memory(ground, size)

    def ways(self, ground: Ground) -> Mapping[str, Way]:
        every = (Cold(ground), Stock(ground), Podman(ground), Quickthaw(ground))
        return {way.name: way for way in every if way.name in self.plan.ways}

    def memory(self, ground: Ground, size: float) -> None:
        for content in self.plan.contents:
            worker = workers.memory(size, content)
            ways = self.ways(ground)
            sources = Sources(ground, ways, self.results, self.plan.runs, WARM_S)
            said = sources.make(worker)
            starting = Starting(ground, ways, self.results, self.tell)
            starting.rounds(
                "memory", worker, said, runs=self.plan.runs, steady_s=self.plan.steady_s
            )
            sources.forget()
