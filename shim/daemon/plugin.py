"""Handles each NRI event: adjusts, decides, takes the outcome, captures, forgets.

containerd waits for every answer, and the pod with it: a task does all slow work.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from shim.contract import faults, outcome
from shim.contract.errors import BadAnnotation
from shim.contract.names import ContainerId
from shim.daemon import adjust
from shim.daemon.company import Company
from shim.daemon.tracked import Pod, State, Tracked
from shim.nri.events import Plugin
from shim.report.records import AnnotationRefused, swap_ended
from shim.restore.forget import forget
from shim.workload.annotations import parse, wanted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from protos import nri_pb2
    from shim.daemon.captures import Captures
    from shim.daemon.decision import Decider
    from shim.daemon.failures import OutcomeCounter
    from shim.daemon.prefetch import Prefetch
    from shim.daemon.registry import Registry
    from shim.report.reporter import Reporter

log = logging.getLogger(__name__)

_RESTART_COUNT = "io.kubernetes.container.restartCount"
_RUNNING = 3  # nri_pb2.CONTAINER_RUNNING; a name of the generated module that mypy cannot see


class NodePlugin(Plugin):
    """The daemon's handlers. They own nothing: the registry has the state."""

    def __init__(
        self,
        registry: Registry,
        decider: Decider,
        captures: Captures,
        reporter: Reporter,
        health: OutcomeCounter,
        prefetch: Prefetch,
    ) -> None:
        self._registry, self._decider, self._prefetch = registry, decider, prefetch
        self._captures, self._reporter, self._health = captures, reporter, health
        self._company = Company(registry)

    async def run_pod_sandbox(self, pod: nri_pb2.PodSandbox) -> None:
        if names := wanted(dict(pod.annotations)):
            self._prefetch.guess(Pod(pod.namespace, pod.name, pod.uid, pod.id), names)

    async def create_container(
        self, pod: nri_pb2.PodSandbox, container: nri_pb2.Container
    ) -> nri_pb2.ContainerAdjustment | None:
        tracked = self._track(pod, container)
        arrived = self._company.arrives(container, is_ours=tracked is not None)
        if tracked is None:
            return None
        faults.point("daemon.create", tracked.container)
        self._learn_of_killed(tracked)
        adjust.prepare(tracked.container)
        arrived.tell(tracked.container)
        faults.point("daemon.create.prepared", tracked.container)
        self._registry.add(tracked)
        adjusted = adjust.adjustment(tracked.container)
        if tracked.wish.gpu == "direct":
            return adjust.with_library(adjusted, container.env)
        return adjusted

    async def post_create_container(
        self, pod: nri_pb2.PodSandbox, container: nri_pb2.Container
    ) -> None:
        if tracked := self._registry.get(container.id):
            tracked.others = self._company.others(container)
            await self._decider.decide(tracked)
            if tracked.state is State.RESTORING:
                self._prefetch.certain(tracked.snapshot)

    async def post_start_container(
        self, pod: nri_pb2.PodSandbox, container: nri_pb2.Container
    ) -> None:
        if tracked := self._registry.get(container.id):
            tracked.runs(container.pid)
            faults.point("daemon.started", tracked.container)
            self._started(tracked)

    async def stop_container(self, pod: nri_pb2.PodSandbox, container: nri_pb2.Container) -> None:
        self._company.leaves(container)
        if tracked := self._registry.get(container.id):
            self._captures.give_up(tracked, "the container ended")
            tracked.let_go()
            self._take_outcome(tracked)  # of a page server that could not go on

    async def remove_container(self, pod: nri_pb2.PodSandbox, container: nri_pb2.Container) -> None:
        self._company.leaves(container)
        if tracked := self._registry.remove(container.id):
            self._captures.give_up(tracked, "the container was removed")
            faults.point("daemon.removed", tracked.container)
            # A create that failed or was refused is known by its outcome alone.
            self._take_outcome(tracked)
            await asyncio.to_thread(forget, tracked.container)

    async def synchronize(
        self, pods: Sequence[nri_pb2.PodSandbox], containers: Sequence[nri_pb2.Container]
    ) -> None:
        """Track the existing containers, and remove our files of containers that do not exist."""
        by_id = {pod.id: pod for pod in pods}
        known = self._registry.replace_all(
            tracked
            for container in containers
            if (pod := by_id.get(container.pod_sandbox_id))
            if (tracked := self._track(pod, container, quiet=True))
        )
        self._company.replace_all(containers)
        for container in containers:
            tracked = known.get(container.id)
            if tracked and container.state == _RUNNING:
                if tracked.held is None:
                    tracked.runs(container.pid)
                self._take_outcome(tracked)  # of a start while the daemon was away
                self._captures.adopt(tracked)
        for found in self._registry.sweep():
            its_pod, name = _pod_of(found)
            subject = its_pod.subject(name) if its_pod else None
            self._reporter.tell(swap_ended(found, subject, is_seen=False))
            self._health.told(found, its_pod, name)

    def _track(
        self, pod: nri_pb2.PodSandbox, container: nri_pb2.Container, *, quiet: bool = False
    ) -> Tracked | None:
        """Returns the container to track; None when its pod did not opt in, or did so wrongly."""
        try:
            wish = parse(dict(pod.annotations), container.name)
        except BadAnnotation as error:
            if not quiet:
                where = Pod(pod.namespace, pod.name, pod.uid, pod.id)
                subject = where.subject(container.name, container.id)
                self._reporter.tell(AnnotationRefused(subject=subject, why=str(error)))
            return None
        if wish is None:
            return None
        restarts = container.annotations.get(_RESTART_COUNT, "0")
        return Tracked(
            ContainerId(container.id),
            container.name,
            Pod(pod.namespace, pod.name, pod.uid, pod.id, tuple(pod.ips)),
            wish,
            restarts=int(restarts) if restarts.isdecimal() else 0,
        )

    def _learn_of_killed(self, tracked: Tracked) -> None:
        """Take the outcome of a killed create, which has no event: the next attempt is the sign."""
        for other in self._registry:
            if (other.pod.sandbox, other.name) == (tracked.pod.sandbox, tracked.name):
                self._take_outcome(other)

    def _started(self, tracked: Tracked) -> None:
        # Whether to capture its like depends on what its failure says about the snapshot.
        result = self._take_outcome(tracked, then=lambda: self._capture(tracked))
        if result == outcome.RESTORED:
            tracked.become(State.RESTORED)
            return
        if tracked.state is not State.COLD:
            tracked.become(State.COLD, tracked.reason)
        if not result:
            self._captures.begin(tracked)

    def _capture(self, tracked: Tracked) -> None:
        if tracked.state is State.COLD and self._registry.get(tracked.container) is tracked:
            self._captures.begin(tracked)

    def _take_outcome(self, tracked: Tracked, then: Callable[[], None] | None = None) -> str:
        """Report the outcome of the swap, if there was a swap. Returns its result or empty.

        then: called when the consequence for the snapshot is known, unless the result is empty.
        """
        try:
            found = outcome.take(tracked.container)
        except (OSError, ValueError) as error:
            log.error("the outcome of %s is damaged: %s", tracked.container, error)
            return ""
        if found is None:
            return ""
        faults.point("daemon.outcome.taken", tracked.container)
        for warning in found.warnings:
            log.warning("container %s: %s", tracked.container, warning)
        if found.result != outcome.RESTORED:
            tracked.become(State.COLD, found.error)
        tracked.snapshot = found.snapshot
        self._reporter.tell(swap_ended(found, tracked.subject, is_seen=True))
        self._health.told(found, tracked.pod, tracked.name, then)
        return found.result


def _pod_of(found: outcome.Outcome) -> tuple[Pod | None, str]:
    """Returns the pod and the container's name in an outcome, as far as its writer knew them."""
    if not found.pod:
        return None, ""
    pod = found.pod
    return Pod(pod["namespace"], pod["name"], pod["uid"], ""), pod["container"]
