"""Reports what became of a container, to people: in the journal, in counters, in events.

A line has the subject, the container, the cause and the remedy. It is written once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from shim.contract.errors import Effect
from shim.daemon.watch import memory
from shim.gate import volumecontent
from shim.kube.event import NORMAL, WARNING, Event
from shim.store.listing import told
from shim.store.room import disk

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from shim.contract.errors import QuickthawError
    from shim.daemon.registry import Pod, Tracked
    from shim.daemon.watch import Watch
    from shim.kube.sender import Sender
    from shim.store.quarantine import Record
    from shim.store.store import Store
    from shim.trust.verdict import Verdict

log = logging.getLogger("quickthawd")

_CONTENT = (
    " volume_content: a Secret or ConfigMap volume holds other data than at the capture, which the "
    "captured process has in memory; quickthaw.io/volume-content: ignore starts from it."
)
_EXPECTED = ("NoSnapshot", "Restart")
"""Reasons for a cold start that make no event: the pod asked for that cold start."""
_BUCKETS_S = (0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Reporter:
    """Keeps counters by result and reason, and writes lines to the journal."""

    def __init__(self) -> None:
        self.metrics = CollectorRegistry()
        self._restores = Counter(
            "quickthaw_restores", "Swaps that were tried, by result.", ["result", "reason"],
            registry=self.metrics,
        )  # fmt: skip
        self._passed_over = Counter(
            "quickthaw_snapshots_passed_over",
            "Untrusted snapshots that were newer than the restored one, by what is the matter.",
            ["state"], registry=self.metrics,
        )  # fmt: skip
        self._refusals = Counter(
            "quickthaw_refusals", "Snapshots that did not fit, by check of the gate.", ["check"],
            registry=self.metrics,
        )  # fmt: skip
        self._captures = Counter(
            "quickthaw_captures", "Captures that were tried, by result.", ["result", "reason"],
            registry=self.metrics,
        )  # fmt: skip
        self._restore_s = Histogram(
            "quickthaw_restore_seconds", "From the call of create to its answer.",
            registry=self.metrics, buckets=_BUCKETS_S,
        )  # fmt: skip
        self._frozen_s = Histogram(
            "quickthaw_capture_frozen_seconds", "How long a captured container was frozen.",
            registry=self.metrics, buckets=_BUCKETS_S,
        )  # fmt: skip

        self._evictions = Counter(
            "quickthaw_evictions", "Snapshots removed to make room.", registry=self.metrics
        )
        self._quarantines = Counter(
            "quickthaw_quarantines", "Snapshots that went to quarantine, by the last failure.",
            ["reason"], registry=self.metrics,
        )  # fmt: skip

        self._events_told = Counter(
            "quickthaw_kubernetes_events", "Events for Kubernetes, by what became of them.",
            ["result"], registry=self.metrics,
        )  # fmt: skip
        self._sender: Sender | None = None

    @contextlib.contextmanager
    def telling_kubernetes(self, kubeconfig: str) -> Iterator[None]:
        """Make events of all reports inside of the `with`; none if `kubeconfig` is empty."""
        if not kubeconfig:
            yield
            return
        from shim.kube.sender import Sender  # here: most nodes have no use for it

        node = os.uname().nodename
        self._sender = Sender(
            kubeconfig, lambda how: self._events_told.labels(how).inc(), node=node
        )
        self._sender.start()
        try:
            yield
        finally:
            self._sender.stop()
            self._sender = None

    def _event(self, pod: Pod | None, container: str, kind: str, reason: str, about: str) -> None:
        if self._sender and pod:
            self._sender.send(
                Event(pod.namespace, pod.name, pod.uid, container, kind, reason, about)
            )

    def watch(self, store: Store) -> None:
        """Show the store's figures whenever somebody looks at the metrics."""
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
            Gauge(f"quickthaw_{name}", about, registry=self.metrics).set_function(count)

    def watch_daemon(self, watch: Watch) -> None:
        """Show the daemon's own use of resources whenever somebody looks at the metrics."""
        for name, about, value in (
            ("loop_greatest_step_seconds", "Longest time that the event loop was busy at once.",
             lambda: watch.wall_s),
            ("loop_greatest_step_cpu_seconds", "The same in processor time.", lambda: watch.cpu_s),
            ("daemon_peak_memory_bytes", "Memory of the daemon at most, since its start.",
             lambda: memory()["peak_bytes"]),
        ):  # fmt: skip
            Gauge(f"quickthaw_{name}", about, registry=self.metrics).set_function(value)

    @contextlib.contextmanager
    def served(self, listen: str) -> Iterator[None]:
        """Show the counters to Prometheus at `HOST:PORT`; nowhere if `listen` is empty.

        Raises OSError when the address is not available.
        """
        if not listen:
            yield
            return
        host, _, port = listen.rpartition(":")
        server, thread = start_http_server(int(port), host.strip("[]"), self.metrics)
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def bad_annotation(self, pod: Pod, container: str, error: QuickthawError) -> None:
        """Report an annotation that we do not understand."""
        self._restores.labels("refused", "BadAnnotation").inc()
        log.warning("pod %s/%s, container %s: %s", pod.namespace, pod.name, container, error)
        self._event(pod, container, WARNING, "BadAnnotation", str(error))

    def no_restore(
        self, tracked: Tracked, reason: str, why: str, codes: Sequence[str] = (), *,
        public: str = "",
    ) -> None:  # fmt: skip
        """Report a cold start, although the pod asked for a restore.

        codes: of the checks that refused. An event has the codes instead of `why`, which shows
        values of the captured pod: more people read events than a node's journal. public: the text
        for the event where `why` is about another namespace.
        """
        self._restores.labels("cold", reason).inc()
        log.info("%s starts cold: %s", _named(tracked), why)
        named = tracked.wish.restore not in ("", "auto")
        if reason in _EXPECTED and not (named and reason == "NoSnapshot"):
            return
        about = _does_not_fit(codes) if codes else f"{public or why}; {Effect.COLD_START}."
        self._event(tracked.pod, tracked.name, WARNING, "RestoreRefused", about)

    def passed_over(self, tracked: Tracked, snapshot: str, verdict: Verdict) -> None:
        """Report an untrusted snapshot that is newer than the restored snapshot."""
        self._passed_over.labels(verdict.state).inc()
        log.warning(
            "%s does not start from snapshot %s, which is newer: %s",
            _named(tracked), snapshot[:12], verdict,
        )  # fmt: skip

    def refused(self, codes: Iterable[str]) -> None:
        """Count the checks that refused a snapshot. `no_restore` reports the cold start."""
        for code in codes:
            self._refusals.labels(code).inc()

    def decided(self, tracked: Tracked) -> None:
        """Report that the container is to be restored."""
        log.info("%s is to start from snapshot %s", _named(tracked), tracked.snapshot[:12])

    def swapped(self, tracked: Tracked, outcome: dict[str, object]) -> None:
        """Report an outcome from `quickthaw-runc`."""
        result, reason = str(outcome.get("result")), str(outcome.get("error_class") or "none")
        seconds = float(str(outcome.get("seconds") or 0))
        self._restores.labels(result, reason).inc()
        self.refused(map(str, codes if isinstance(codes := outcome.get("refusals"), list) else ()))
        snapshot = str(outcome.get("snapshot"))[:12]
        if result == "restored":
            self._restore_s.observe(seconds)
            steps = outcome.get("steps")
            log.info("%s restored from %s in %.3f s %s", _named(tracked), snapshot, seconds, steps)
            about = f"restored from snapshot {snapshot} in {seconds:.3f} s"
            self._event(tracked.pod, tracked.name, NORMAL, "Restored", about)
        else:
            log.warning("%s: %s", _named(tracked), outcome.get("error"))
            self._event(tracked.pod, tracked.name, WARNING, reason, _public(outcome))

    def swapped_unseen(self, pod: Pod | None, container: str, outcome: dict[str, object]) -> None:
        """Report the outcome of a container that came and went while the daemon was down."""
        result, reason = str(outcome.get("result")), str(outcome.get("error_class") or "none")
        self._restores.labels(result, reason).inc()
        if outcome.get("error"):
            named = f"{pod.namespace}/{pod.name}/{container}: " if pod else ""
            log.warning("while quickthawd was away: %s%s", named, outcome["error"])
            self._event(pod, container, WARNING, reason, _public(outcome))

    def quarantined(self, snapshot: str, record: Record, pod: Pod | None, container: str) -> None:
        """Report a quarantine: from now on pods start cold. pod: of the last failed restore."""
        self._quarantines.labels(record.error_class or "none").inc()
        log.warning(
            "snapshot %s goes to quarantine: %s; pods start cold. Look at its log with `quickthaw "
            "show %s`, then `quickthaw quarantine release` or `quickthaw rm` it.",
            snapshot[:12], told(record), snapshot[:12],
        )  # fmt: skip
        about = f"snapshot {snapshot[:12]} goes to quarantine, pods start cold: {told(record)}"
        self._event(pod, container, WARNING, "SnapshotQuarantined", about)

    def evicted(self, snapshot: str, size_bytes: int, last_use: float) -> None:
        """Report an eviction: the snapshot was removed to make room for another."""
        self._evictions.inc()
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(last_use))
        log.info(
            "snapshot %s (%d bytes, last used %s) is removed to make room for another",
            snapshot[:12], size_bytes, when,
        )  # fmt: skip

    def released(self, snapshot: str) -> None:
        """Report that a person took the snapshot out of quarantine."""
        log.info("snapshot %s is released from quarantine", snapshot[:12])

    def not_to_capture(self, tracked: Tracked, why: str, *, public: str = "") -> None:
        """Report that earlier failures speak against the capture that the pod wants.

        public: the text for the event where `why` may be about another namespace.
        """
        self._captures.labels("refused", "quarantine").inc()
        log.warning("%s is not captured: %s", _named(tracked), why)
        self._event(tracked.pod, tracked.name, WARNING, "NotCaptured", public or why)

    def captured(self, tracked: Tracked, frozen_s: float, total_s: float) -> None:
        """Report a published snapshot."""
        self._captures.labels("published", "none").inc()
        self._frozen_s.observe(frozen_s)
        log.info(
            "%s captured as %s: frozen %.3f s, %.3f s in all",
            _named(tracked), tracked.snapshot[:12], frozen_s, total_s,
        )  # fmt: skip
        about = f"captured as snapshot {tracked.snapshot[:12]}: frozen for {frozen_s:.3f} s"
        self._event(tracked.pod, tracked.name, NORMAL, "Captured", about)

    def not_captured(self, tracked: Tracked, error: QuickthawError) -> None:
        """Report a failed capture, whose source goes on serving."""
        self._captures.labels("failed", type(error).__name__).inc()
        log.warning("%s: %s", _named(tracked), error)
        self._event(tracked.pod, tracked.name, WARNING, type(error).__name__, str(error))

    def counters(self) -> dict[str, float]:
        """Returns every counter that is not zero, as `name{labels}`: for `quickthaw status`."""
        found = {}
        for family in self.metrics.collect():
            for sample in family.samples:
                if sample.name.endswith("_total") and sample.value:
                    labels = ",".join(f'{k}="{v}"' for k, v in sorted(sample.labels.items()))
                    found[f"{sample.name}{{{labels}}}"] = sample.value
        return found


def _public(outcome: Mapping[str, object]) -> str:
    """Returns the text for the event about a failed swap."""
    codes = outcome.get("refusals")
    if isinstance(codes, list) and codes:
        return _does_not_fit([str(code) for code in codes])
    return str(outcome.get("error"))


def _does_not_fit(codes: Sequence[str]) -> str:
    hint = _CONTENT if volumecontent.CODE in codes else ""
    return (
        f"no snapshot fits the container: refused by {', '.join(codes)}; {Effect.COLD_START}."
        f"{hint} `quickthaw explain` on the node shows what differs."
    )


def _named(tracked: Tracked) -> str:
    pod = tracked.pod
    return f"{pod.namespace}/{pod.name}/{tracked.name} ({tracked.container[:12]})"
