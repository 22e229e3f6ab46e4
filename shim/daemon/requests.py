"""Answers requests of people: the verbs of the control socket. JSON objects in and out."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shim import version
from shim.contract.errors import NoSuchPod, NotRemoved
from shim.contract.names import SnapshotId
from shim.contract.paths import LOGS, SNAPSHOTS
from shim.daemon.containerd import ContainerdRefused
from shim.daemon.control import text
from shim.daemon.users import users, with_diff_mounted
from shim.daemon.watch import memory
from shim.daemon.which import container_asked_for
from shim.nri.session import Configured, Lost, Synchronized
from shim.report.records import Released
from shim.store import listing

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from shim.daemon.captures import Captures
    from shim.daemon.registry import Registry
    from shim.daemon.tracked import Tracked
    from shim.daemon.watch import SlowSteps
    from shim.nri.session import State as NriState
    from shim.report.reporter import Reporter
    from shim.store.store import Store
    from shim.trust.verdict import Trust

log = logging.getLogger("quickthawd")

_LONG_S = 0.5


class Requests:
    """The handlers. `nri` takes every change of the session with containerd."""

    def __init__(
        self,
        store: Store,
        trust: Trust,
        registry: Registry,
        captures: Captures,
        reporter: Reporter,
        watch: SlowSteps,
    ) -> None:
        self._watch = watch
        self._store, self._trust, self._registry = store, trust, registry
        self._captures, self._reporter = captures, reporter
        reporter.metrics.watch(store)
        self._started = time.time()
        self._runtime, self._connected_since, self._lost = "", 0.0, "not connected yet"

    def verbs(self) -> Mapping[str, Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]]]:
        """Returns verb to handler."""
        return {
            "ls": self._ls, "show": self._show, "rm": self._rm, "capture": self._capture,
            "status": self._status, "quarantine": self._quarantine, "release": self._release,
        }  # fmt: skip

    def nri(self, state: NriState) -> None:
        """Remember the state of the session with containerd."""
        match state:
            case Configured(runtime):
                self._runtime = f"{runtime.name} {runtime.version}"
                self._connected_since = time.time()
                log.info("plugin of %s", self._runtime)
            case Lost(why, again_s):
                self._connected_since, self._lost = 0.0, why
                log.log(
                    logging.INFO if again_s < _LONG_S else logging.WARNING,
                    "no containerd: %s; next attempt in %.2f s; pods start cold", why, again_s,
                )  # fmt: skip
            case Synchronized(pods, containers):
                log.info("synchronized with %d pods, %d containers", pods, containers)

    async def _ls(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return listing.listed(self._store, with_diff_mounted(), trust=self._trust)

    async def _show(self, request: Mapping[str, Any]) -> dict[str, Any]:
        found = self._store.get(text(request, "id"))
        log_path = Path(LOGS) / f"{found.id}.log"
        kept = str(log_path) if await asyncio.to_thread(log_path.exists) else ""
        return listing.shown(self._store, found, with_diff_mounted(), trust=self._trust, log=kept)

    async def _rm(self, request: Mapping[str, Any]) -> dict[str, Any]:
        wanted = text(request, "id")
        damaged = wanted in self._store.damaged
        found = SnapshotId(wanted) if damaged else self._store.get(wanted).id
        in_use = users(self._registry).get(found, [])
        # From here on nobody gets a ticket for the snapshot: nothing was awaited meanwhile.
        withdrawn = None if in_use else self._store.withdraw(found)
        try:
            await asyncio.to_thread(self._store.remove, found, users=in_use)
        except OSError as error:
            self._store.put_back(withdrawn)
            raise NotRemoved(
                "cannot remove the snapshot", about=found[:12], why=str(error),
                do=f"Can {SNAPSHOTS} be written to?",
            ) from error  # fmt: skip
        return {"removed": found}

    async def _quarantine(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return listing.quarantined(self._store)

    async def _release(self, request: Mapping[str, Any]) -> dict[str, Any]:
        wanted = text(request, "id")
        found = wanted if wanted in self._store.damaged else self._store.get(wanted).id
        record = await asyncio.to_thread(self._store.quarantine.release, found)
        self._reporter.tell(Released(snapshot=found))
        return {"released": found, "reason": listing.told(record)}

    async def _capture(self, request: Mapping[str, Any]) -> dict[str, Any]:
        tracked = container_asked_for(
            self._registry, request, "cannot capture", running=True,
            none_why="no running container of a pod with this name has a quickthaw.io/snapshot or "
            "quickthaw.io/restore annotation",
            none_do="Only a container that opted in when it was created can be captured.",
        )  # fmt: skip
        try:
            found = await self._captures.now(tracked)
        except ContainerdRefused as error:
            raise NoSuchPod(
                "cannot capture", about=tracked.pod.name, why=str(error),
                do="Is the container still running?",
            ) from error  # fmt: skip
        return {"id": found.id, "timings": dict(found.timings)}

    async def _status(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "daemon": {
                "pid": os.getpid(),
                "version": version.VERSION,
                "uptime_s": round(time.time() - self._started, 1),
                "nri": {
                    "connected": bool(self._connected_since),
                    "since": self._connected_since,
                    "reason": "" if self._connected_since else self._lost,
                },
                "containerd": self._runtime,
                "loop": self._watch.as_json(),
                "memory": memory(),
            },
            "containers": [_container(tracked) for tracked in self._registry],
            "snapshots": len(self._store.all()),
            "quarantined": listing.quarantined(self._store)["quarantined"],
            "counters": self._reporter.metrics.counters(),
        }


def _container(tracked: Tracked) -> dict[str, Any]:
    return {
        "id": tracked.container, "pod": tracked.pod.name, "namespace": tracked.pod.namespace,
        "container": tracked.name, "state": str(tracked.state), "snapshot": tracked.snapshot,
        "reason": tracked.reason, "seconds": round(time.monotonic() - tracked.since, 1),
    }  # fmt: skip
