"""Asks, captures and checkpoints warm workers; the stored state stays for the replicas."""

from __future__ import annotations

import contextlib
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tests.bench.asking import PORT, Asked, Asking
from tests.bench.ground import size_of
from tests.bench.podman import Podman
from tests.bench.ways import COLD, PODMAN, QUICK, STOCK, Quickthaw, Stock, Way
from tests.node import source
from tests.node.swapping import RESTORE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.bench.ground import Ground
    from tests.bench.result import Results
    from tests.bench.workers import Worker
    from tests.node.kubelet import Pod

BOTH_AT_MOST_BYTES: Final = 5 << 30
"""Larger workers are captured one after the other: two and their images exceed the memory."""
WARM_S: Final = 6.0
CAPTURE: Final = "capture"


@dataclass(frozen=True, slots=True)
class Sources:
    """Makes the stored state of every way for a worker.

    keep: quickthaw's snapshots of other workers stay.
    """

    ground: Ground
    ways: Mapping[str, Way]
    results: Results
    captures: int
    warm_s: float = WARM_S
    keep: bool = False

    def make(self, worker: Worker) -> dict[str, str]:
        """Run sources, measure them and their capture. Returns the first answers, by way.

        Raises AssertionError when a capture of quickthaw has harmed its source.
        """
        self.ground.image(worker.image)
        said: dict[str, str] = {}
        names = [name for name in (QUICK, STOCK) if name in self.ways]
        together = worker.bytes <= BOTH_AT_MOST_BYTES
        for group in [names] if together else [[name] for name in names]:
            with ExitStack() as stack:
                pods = {name: stack.enter_context(self._pod(worker, name, said)) for name in group}
                for _ in range(self.captures if together else 1):
                    for name, pod in pods.items():
                        self._capture(worker, name, pod)
        if PODMAN in self.ways:
            said[PODMAN] = self._export(worker)
        for name in (*names, PODMAN):
            stored = self.ways[name].stored() if name in self.ways else None
            if stored is not None:
                self.results.add(CAPTURE, worker.name, name, stored_bytes=size_of(stored))
        return said

    @contextmanager
    def _pod(self, worker: Worker, name: str, said: dict[str, str]) -> Iterator[Pod]:
        annotations = RESTORE if name == QUICK else {}  # nothing is there to be restored
        kubelet = self.ground.node.kubelet
        with kubelet.make_pod(
            f"source-{name}", [worker.container()], annotations=annotations
        ) as pod:
            pod.run_sandbox()
            pod.container().create()
            with Asking(self.ground.node, pod.ip, worker.request, self.warm_s) as asking:
                pod.container().start()
                asked = asking.found()
            said[name] = worker.same(asked.answer())
            if name == QUICK:
                said[COLD] = said[name]
                self._warm(worker, asked)
            self._pauses(pod)
            yield pod

    def _warm(self, worker: Worker, asked: Asked) -> None:
        """Record the latencies that replicas are compared with, second by second."""
        every = asked.percentiles()
        for second in asked.by_second()[1:]:  # in the first second the worker's caches were cold
            self.results.add(CAPTURE, worker.name, "warm", **second)
        overall = {name: every[name] for name in ("p50_s", "p99_s") if name in every}
        self.results.add(CAPTURE, worker.name, "warm", **overall)

    def _capture(self, worker: Worker, name: str, pod: Pod) -> None:
        self._pauses(pod)
        found: dict[str, float] = {}
        way = self.ways[name]
        before = source.settled(pod.container()) if isinstance(way, Quickthaw) else None
        if isinstance(way, Quickthaw):
            if not self.keep:
                way.forget()
            found["total_s"], timings = way.capture(pod)
            found |= {f"{step}_step_s": seconds for step, seconds in timings.items()}
        elif isinstance(way, Stock):
            found["total_s"] = way.checkpoint(pod)
        frozen = self._pauses(pod)
        if frozen is not None:
            found["frozen_s"] = frozen
        if before:
            source.assert_unharmed(pod.container(), before)
        self.results.add(CAPTURE, worker.name, name, **found)

    def _pauses(self, pod: Pod) -> float | None:
        """Returns the worker's longest pause since the last question; None without an account."""
        answer = self.ground.node.http("GET", pod.ip, PORT, "/pauses?watch=1")
        return float(answer.json()["longest_s"]) if answer.status == 200 else None

    def _export(self, worker: Worker) -> str:
        podman = self.ways[PODMAN]
        assert isinstance(podman, Podman)
        with (
            podman.source(worker) as ip,
            Asking(self.ground.node, ip, worker.request, 0) as asking,
        ):
            said = worker.same(asking.found().answer())
            self.results.add(CAPTURE, worker.name, PODMAN, total_s=podman.export())
        return said

    def forget(self) -> None:
        """Remove all stored state."""
        for way in self.ways.values():
            with contextlib.suppress(FileNotFoundError):
                way.forget()
