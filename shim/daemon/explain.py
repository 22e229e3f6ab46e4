"""Answers the control socket's verb `explain`: the gate's findings for container and snapshot."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from shim.contract.errors import NoSuchPod, NoSuchSnapshot
from shim.daemon.containerd import ContainerdRefused
from shim.daemon.control import text
from shim.daemon.which import container_asked_for
from shim.gate.explain import explained, nearest, nothing
from shim.store.listing import told

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from shim.contract.manifest import Manifest
    from shim.daemon.captures import Captures
    from shim.daemon.decision import Decider
    from shim.daemon.registry import Registry
    from shim.daemon.tracked import Identity, Tracked
    from shim.store.store import Store


class Explaining:
    """Handles the verb. It changes nothing, and finds its answer as the decision does."""

    def __init__(
        self, store: Store, registry: Registry, decider: Decider, captures: Captures
    ) -> None:
        self._store, self._registry, self._decider = store, registry, decider
        self._captures = captures

    def verbs(self) -> Mapping[str, Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]]]:
        """Returns verb to handler."""
        return {"explain": self._explain}

    async def _explain(self, request: Mapping[str, Any]) -> dict[str, Any]:
        tracked = container_asked_for(
            self._registry, request, "cannot explain",
            none_why="no container of a pod with this name has a quickthaw.io/ annotation",
            none_do="For a pod that is not here, give the path of its OCI spec.",
        )  # fmt: skip
        try:
            identity = tracked.identity or await self._decider.identify(tracked)
        except (ContainerdRefused, ValueError) as error:
            raise NoSuchPod(
                "cannot explain", about=tracked.pod.name, why=f"its spec is not known: {error}",
                do="Is the container still there?",
            ) from error  # fmt: skip
        answer = {
            "container": {
                "id": tracked.container, "namespace": tracked.pod.namespace,
                "pod": tracked.pod.name, "container": tracked.name, "state": str(tracked.state),
                "reason": tracked.reason,
            },
            "capture": await self._captures.gpu_findings(tracked, identity),
        }  # fmt: skip
        try:
            wanted = text(request, "snapshot", "")
            # In a thread: it may compare with every snapshot of a namespace.
            found, chosen = await asyncio.to_thread(self._chosen, tracked, identity, wanted)
        except NoSuchSnapshot as error:
            if not answer["capture"]:
                raise
            return answer | {"chosen": error.why, "quarantine": "", **nothing()}
        record = self._store.quarantine.get(found.id)
        return answer | {
            "chosen": chosen, "quarantine": told(record) if record else "",
            **await asyncio.to_thread(explained, found, identity.request),
        }  # fmt: skip

    def _chosen(self, tracked: Tracked, identity: Identity, wanted: str) -> tuple[Manifest, str]:
        """Returns the snapshot to compare with, and why this snapshot."""
        if wanted:
            # A name means the same snapshot as in the pod's own annotation, if that exists.
            named = self._store.find(namespace=tracked.pod.namespace, name=wanted)
            return named[0] if named else self._store.get(wanted), "asked for"
        candidates = self._decider.candidates(tracked, identity)
        if found := nearest(identity.request, candidates):
            return found, "a candidate of the decision"
        found = nearest(identity.request, self._store.find(namespace=tracked.pod.namespace))
        if found is None:
            raise NoSuchSnapshot(
                "cannot explain", about=tracked.pod.namespace,
                why="there are no snapshots of this namespace",
                do="Name a snapshot with --snapshot, or wait for the capture of such a pod.",
            )  # fmt: skip
        return found, "no candidate of the decision: the nearest of its namespace"
