"""Starts several replicas of a worker at once: measures the time to each answer, and the memory."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tests.bench import resident
from tests.bench.asking import Asking
from tests.bench.resident import Sampler, filled
from tests.bench.turns import turns

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from tests.bench.ground import Ground
    from tests.bench.result import Results
    from tests.bench.ways import Place, Way
    from tests.bench.workers import Worker

MANY: Final = "many"


@dataclass(frozen=True, slots=True)
class AtOnce:
    """Starts replicas in the same moment."""

    ground: Ground
    ways: Mapping[str, Way]
    results: Results
    tell: Callable[[str], None]

    def rounds(self, worker: Worker, counts: Sequence[int], runs: int) -> None:
        """Start each number of replicas in each way, by turns, `runs` times."""
        names = list(self.ways)
        for number in range(runs):
            for count in counts:
                for name in turns(names, number):
                    self.ground.settle()
                    found = self._start(worker, name, count)
                    self.results.add(MANY, f"{worker.name}-x{count}", name, **found)
                    self.tell(
                        f"{MANY} {count} x {worker.name} {name}: last answer "
                        f"{found['last_answer_s']:.3f} s, {found['pss_bytes'] / 2**20:.0f} MiB"
                    )

    def _start(self, worker: Worker, name: str, count: int) -> dict[str, float]:
        with ExitStack() as stack:
            places = [
                stack.enter_context(self.ways[name].place(worker, f"{name}-{n}", alone=count == 1))
                for n in range(count)
            ]
            sampler = stack.enter_context(Sampler(lambda: _cgroups(places), shared=worker.shared))
            threads = stack.enter_context(ThreadPoolExecutor(count, "replica"))
            called_s = time.perf_counter()
            answered = list(threads.map(lambda place: self._answer(place, worker), places))
            sampler.settled()
            memory = filled(sampler.levels, called_s)
            unlike = [place for place in places if not place.restored()]
            if unlike:
                raise RuntimeError(f"{len(unlike)} of {count} replicas by {name} started cold")
            cgroups = _cgroups(places)
            return {
                "first_answer_s": min(answered) - called_s,
                "last_answer_s": max(answered) - called_s,
                "resident_s": memory.resident_s,
                "resident_bytes": memory.bytes,
                "pss_bytes": resident.proportional_bytes(cgroups),
            }

    def _answer(self, place: Place, worker: Worker) -> float:
        """Start a replica. Returns the time of its first answer."""
        node = self.ground.node
        if place.ip:
            with Asking(node, place.ip, worker.request, 0) as asking:
                place.start()
                return asking.found().first_at_s
        place.start()
        with Asking(node, place.address(), worker.request, 0) as asking:
            return asking.found().first_at_s


def _cgroups(places: Sequence[Place]) -> list[Path]:
    """Returns the cgroups of all places. For podman every place names all."""
    return sorted({cgroup for place in places for cgroup in place.cgroups()})
