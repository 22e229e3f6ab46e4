"""Starts replicas by turns in every way: first answer, all memory there, latencies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tests.bench import limits
from tests.bench.asking import Asking
from tests.bench.ground import cache, evict
from tests.bench.resident import Sampler, filled
from tests.bench.sources import BOTH_AT_MOST_BYTES
from tests.bench.turns import turns
from tests.bench.ways import QUICK

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.bench.ground import Ground
    from tests.bench.result import Results
    from tests.bench.ways import Way
    from tests.bench.workers import Worker


_MORE_BYTES: Final = 1 << 30
"""The memory of a replica beyond its nominal size; a server's memory is not nominal."""


class WrongReplica(Exception):
    """A replica was not made as intended: its figures would mean nothing."""


@dataclass(frozen=True, slots=True)
class Starting:
    """Starts a replica at a time and records the figures.

    said: the answer of each way's source, by way (see Sources.make). as_bytes: touch memory before
    a start as for a worker of this size; 0: of the worker's own size.
    """

    ground: Ground
    ways: Mapping[str, Way]
    results: Results
    tell: Callable[[str], None]
    as_bytes: int = 0

    def rounds(
        self,
        part: str,
        worker: Worker,
        said: Mapping[str, str],
        *,
        runs: int,
        steady_s: float,
        uncached: bool = False,
        limit: bool = False,
    ) -> None:
        """Start `runs` replicas in every way, by turns. Raises WrongReplica, TimeoutError.

        uncached: the files that a way reads are not in the page cache. limit: measure before each
        of quickthaw's turns how fast fresh memory can be filled from the same file.
        """
        names = list(self.ways)
        for number in range(runs):
            for name in turns(names, number):
                if limit and name == QUICK:
                    self._limit(part, worker)
                self._files(worker, name, uncached=uncached)
                found = self.one(worker, name, said, 0.0)
                self.results.add(part, worker.name, name, **found)
                if steady_s:
                    # Another replica: a worker that answers meanwhile leaves less of the machine
                    # for filling.
                    asked = self.one(worker, name, said, steady_s)
                    latencies = {
                        key: asked[key] for key in asked if key.endswith(("p50_s", "p99_s"))
                    }
                    self.results.add(part, worker.name, name, **latencies)
                self.tell(
                    f"{part} {worker.name} {name}: first answer {found['first_answer_s']:.3f} s, "
                    f"resident {found['resident_s']:.3f} s"
                )

    def _limit(self, part: str, worker: Worker) -> None:
        stored = self.ways[QUICK].stored()
        assert stored is not None
        content = max(stored.rglob("*.data"), key=lambda file: file.stat().st_size)
        can = limits.fill(content, worker.bytes, max(limits.THREADS))
        self.results.add(part, worker.name, limits.LIMIT, **can)

    def _files(self, worker: Worker, name: str, *, uncached: bool) -> None:
        """Have the files that a way reads in the page cache, or not, and the disk idle."""
        self.ground.settle()
        way, is_large = self.ways[name], worker.bytes > BOTH_AT_MOST_BYTES
        for other in self.ways.values():
            # All files and a replica exceed the machine's memory: the touch before the start would
            # push out the files that were read for the replica.
            if is_large and other is not way and (stored := other.stored()) is not None:
                evict(stored)
        if (stored := way.stored()) is not None:
            (evict if uncached else cache)(stored)

    def one(
        self, worker: Worker, name: str, said: Mapping[str, str], steady_s: float
    ) -> dict[str, float]:
        """Start a replica. Returns its metrics."""
        with (
            self.ways[name].place(worker, f"replica-{name}") as place,
            Asking(self.ground.node, place.ip, worker.request, steady_s) as asking,
            Sampler(place.cgroups, shared=worker.shared) as sampler,
        ):
            # Unused memory goes back to the host of a virtual machine within seconds.
            most = self.as_bytes or worker.bytes
            # Shared memory may be made of huge pages.
            limits.touch(most + most // 8 + _MORE_BYTES, huge=worker.shared)
            called_s = place.start()
            asked = asking.found()
            sampler.settled()
            self._check(worker, name, worker.same(asked.answer()), said, restored=place.restored())
            memory = filled(sampler.levels, called_s)
        return {
            "first_answer_s": asked.first_at_s - called_s,
            "resident_s": memory.resident_s,
            "resident_bytes": memory.bytes,
            "fill_bytes_per_s": memory.bytes_per_s,
            "errors": asked.errors,
            "same_answer": float(name == "cold" or worker.same(asked.answer()) == said[name]),
            **asked.percentiles(),
        }

    def _check(
        self, worker: Worker, name: str, answer: str, said: Mapping[str, str], *, restored: bool
    ) -> None:
        cold = name == "cold"
        same = answer == said[name]
        if not restored or (same == cold and worker.by_process) or (not same and not cold):
            raise WrongReplica(
                f"{name} of {worker.name}: restored as meant: {restored}; its first answer "
                f"{'is' if same else 'is not'} the source's"
            )
