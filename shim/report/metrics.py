"""The counters for Prometheus, by result and reason."""

from __future__ import annotations

import contextlib
from functools import singledispatchmethod
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from shim.contract import outcome
from shim.report import records
from shim.store.room import disk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shim.report.records import Happened
    from shim.store.store import Store

_BUCKETS_S: Final = (0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Metrics:
    """registry: what `served` shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._restores = self._counter(
            "restores", "Swaps that were tried, by result.", "result", "reason"
        )
        self._passed_over = self._counter(
            "snapshots_passed_over",
            "Untrusted snapshots that were newer than the restored one, by what is the matter.",
            "state",
        )
        self._refusals = self._counter(
            "refusals", "Snapshots that did not fit, by check of the gate.", "check"
        )
        self._captures = self._counter(
            "captures", "Captures that were tried, by result.", "result", "reason"
        )
        self._restore_s = self._histogram("restore", "From the call of create to its answer.")
        self._frozen_s = self._histogram(
            "capture_frozen", "How long a captured container was frozen."
        )
        self._evictions = self._counter("evictions", "Snapshots removed to make room.")
        self._quarantines = self._counter(
            "quarantines", "Snapshots that went to quarantine, by the last failure.", "reason"
        )
        self._events = self._counter(
            "kubernetes_events", "Events for Kubernetes, by what became of them.", "result"
        )

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"quickthaw_{name}", about, labels, registry=self.registry)

    def _histogram(self, name: str, about: str) -> Histogram:
        return Histogram(
            f"quickthaw_{name}_seconds", about, registry=self.registry, buckets=_BUCKETS_S
        )

    @singledispatchmethod
    def tell(self, record: Happened) -> None:
        """Count the record. Records without a counter of their own are not counted."""

    @tell.register
    def _(self, record: records.AnnotationRefused) -> None:
        self._restores.labels("refused", "BadAnnotation").inc()

    @tell.register
    def _(self, record: records.StartsCold) -> None:
        self._restores.labels("cold", record.reason).inc()
        self._refused(record)

    @tell.register
    def _(self, record: records.PassedOver) -> None:
        self._passed_over.labels(record.reason).inc()

    @tell.register
    def _(self, record: records.SwapEnded) -> None:
        self._restores.labels(record.result, record.reason or "none").inc()
        self._refused(record)
        if record.is_seen and record.result == outcome.RESTORED:
            self._restore_s.observe(record.seconds)

    @tell.register
    def _(self, record: records.Quarantined) -> None:
        self._quarantines.labels(record.reason or "none").inc()

    @tell.register
    def _(self, record: records.Evicted) -> None:
        del record
        self._evictions.inc()

    @tell.register
    def _(self, record: records.CaptureRefused) -> None:
        self._captures.labels("refused", record.reason).inc()

    @tell.register
    def _(self, record: records.Captured) -> None:
        self._captures.labels("published", "none").inc()
        self._frozen_s.observe(record.frozen_s)

    @tell.register
    def _(self, record: records.CaptureEndedInFailure) -> None:
        self._captures.labels("failed", record.reason).inc()

    def _refused(self, record: Happened) -> None:
        for code in record.codes:
            self._refusals.labels(code).inc()

    def event(self, result: str) -> None:
        """Count an event for Kubernetes. result: `sent`, `failed` and so on."""
        self._events.labels(result).inc()

    def watch(self, store: Store) -> None:
        """Show the figures of the store."""
        for name, about, count in (
            ("snapshots", "Snapshots.", lambda: len(store.all())),
            ("snapshots_quarantined", "Those in quarantine.", lambda: len(store.quarantine.all())),
            (
                "snapshots_bytes",
                "Bytes on disk of all snapshots.",
                lambda: sum(found.sizes.total for found in store.all()),
            ),
            ("store_free_bytes", "Bytes left on its disk.", lambda: disk(store.root).free_bytes),
        ):
            self.show(name, about, count)

    def show(self, name: str, about: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is asked for whenever somebody looks at the metrics."""
        Gauge(f"quickthaw_{name}", about, registry=self.registry).set_function(value)

    @contextlib.contextmanager
    def served(self, listen: str) -> Iterator[None]:
        """Show the counters to Prometheus at `HOST:PORT`; nowhere if `listen` is empty.

        Raises OSError when the address is not available.
        """
        if not listen:
            yield
            return
        host, _, port = listen.rpartition(":")
        server, thread = start_http_server(int(port), host.strip("[]"), self.registry)
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def counters(self) -> dict[str, float]:
        """Returns every counter that is not zero, as `name{labels}`: for `quickthaw status`."""
        found = {}
        for family in self.registry.collect():
            for sample in family.samples:
                if sample.name.endswith("_total") and sample.value:
                    labels = ",".join(f'{k}="{v}"' for k, v in sorted(sample.labels.items()))
                    found[f"{sample.name}{{{labels}}}"] = sample.value
        return found
