"""Decides which container is captured, and when: a task for each, from its readiness on.

Only one container is captured for a key: while it waits or is captured, others like it only run.
`shim.daemon.capturing` does the capture.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from shim.contract.errors import GpuLost, NotCapturable, QuickthawError, SourceHarmed
from shim.contract.paths import SWAPPED
from shim.daemon import gpucaptures
from shim.daemon.capturing import Capturing
from shim.daemon.containerd import ContainerdRefused
from shim.daemon.room import Room
from shim.daemon.tracked import State
from shim.gate import volumecontent
from shim.report.records import Captured, CaptureRefused, capture_failed
from shim.source.source import thaw_left
from shim.store.listing import told
from shim.workload.annotations import SignalReady
from shim.workload.readiness import wait_until_ready

if TYPE_CHECKING:
    from shim.contract.manifest import Manifest
    from shim.daemon.config import Config
    from shim.daemon.decision import Decider
    from shim.daemon.registry import Registry
    from shim.daemon.tracked import Identity, Tracked
    from shim.report.reporter import Reporter
    from shim.store.store import Store
    from shim.trust.verdict import Trust

log = logging.getLogger(__name__)

_ORPHAN_EVERY_S = 0.2
"""Seconds between two looks whether the checkpoint of a killed daemon has ended."""


class Captures:
    """Starts, bounds and cancels captures. Call all methods on the event loop."""

    def __init__(
        self,
        config: Config,
        store: Store,
        trust: Trust,
        registry: Registry,
        decider: Decider,
        reporter: Reporter,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._config, self._store, self._registry = config, store, registry
        self._trust = trust
        self._decider, self._reporter, self._tasks = decider, reporter, tasks
        room = Room(config, store, registry, reporter)
        self._capturing = Capturing(config, store, trust, decider, room)
        self._turn = asyncio.Semaphore(config.max_captures_at_once)

    def begin(self, tracked: Tracked) -> None:
        """Capture the container when ready, if its pod wants that and no other capture will do."""
        if not tracked.wish.snapshot or tracked.identity is None or tracked.task is not None:
            return
        if self._has_snapshot(tracked, tracked.identity):
            tracked.become(State.COLD, tracked.reason or "there is a snapshot of its like already")
            return
        if why := self._speaks_against(tracked, tracked.identity):
            tracked.become(State.COLD, why)
            # Where namespaces share snapshots, the reason may be about another namespace's pod.
            is_shared, public = self._config.cross_namespace, "a like snapshot is in quarantine"
            self._reporter.tell(
                CaptureRefused(
                    subject=tracked.subject, reason="quarantine", why=why,
                    public=public if is_shared else "",
                )
            )  # fmt: skip
            return
        others = [
            other
            for other in self._registry
            if other.task and other.identity and _are_alike(other.identity, tracked.identity)
        ]
        if others:
            tracked.become(State.COLD, f"{others[0].pod.name} is being captured for it")
            return
        tracked.task = self._tasks.create_task(
            self._when_ready(tracked, tracked.identity), name=f"capture {tracked.container[:12]}"
        )

    def adopt(self, tracked: Tracked) -> None:
        """Continue the last daemon's work on a container that ran before this daemon started."""
        if tracked.task is None and tracked.state is State.CREATED:
            tracked.task = self._tasks.create_task(self._adopted(tracked))

    def give_up(self, tracked: Tracked, why: str) -> None:
        """Cancel the capture of a container that has ended."""
        if tracked.task is not None:
            tracked.task.cancel(why)

    async def now(self, tracked: Tracked) -> Manifest:
        """Capture a running container at once, because a person asked. Raises CaptureFailed."""
        if tracked.identity is None:
            tracked.identity = await self._decider.identify(tracked)
        if tracked.task is not None:
            raise NotCapturable(
                "cannot capture", about=tracked.container,
                why=f"it is {tracked.state}", do="Wait for it, and look at `quickthaw status`.",
            )  # fmt: skip
        before = tracked.state, tracked.reason
        # Not the request's task, which survives the end of the container and answers.
        tracked.task = task = asyncio.ensure_future(self._capture(tracked, tracked.identity))
        try:
            return await task
        except Exception:
            tracked.become(*before)
            raise
        except asyncio.CancelledError as error:
            tracked.become(*before)
            asking = asyncio.current_task()
            if asking and asking.cancelling():
                raise
            raise SourceHarmed(
                "cannot capture", about=tracked.container,
                why="the container ended during its capture",
                do="Look for why it ended: `kubectl describe pod` tells of the OOM killer.",
            ) from error  # fmt: skip
        finally:
            tracked.task = None

    async def gpu_findings(self, tracked: Tracked, identity: Identity) -> list[dict[str, object]]:
        """Returns findings on a running container's GPUs; empty without any GPU in use."""
        if not tracked.pid:
            return []
        return await gpucaptures.findings(lambda: self._capturing.source(tracked, identity))

    async def _adopted(self, tracked: Tracked) -> None:
        try:
            while not thaw_left(tracked.container):  # noqa: ASYNC110 - a lock wakes only threads
                await asyncio.sleep(_ORPHAN_EVERY_S)
            tracked.identity = await self._decider.identify(tracked)
            if left := await self._recovered(tracked, tracked.identity):
                log.warning("container %s: %s run on their GPUs again", tracked.container, left)
        except GpuLost as error:
            log.error("%s", error)
            return
        except (ContainerdRefused, OSError, ValueError) as error:
            log.warning("container %s stays as it is: %s", tracked.container, error)
            return
        finally:
            tracked.task = None
        if Path(f"{SWAPPED}/{tracked.container}").exists():  # noqa: ASYNC240 - /run is in memory
            tracked.become(State.RESTORED)
            return
        tracked.become(State.COLD, "it ran before the daemon did")
        self.begin(tracked)

    async def _recovered(self, tracked: Tracked, identity: Identity) -> list[int]:
        """Give its GPUs back to a container that a daemon which was killed had checkpointed."""
        return await gpucaptures.recovered(
            tracked.container, lambda: self._capturing.source(tracked, identity)
        )

    def _like(self, tracked: Tracked, identity: Identity) -> list[Manifest]:
        """Returns the snapshots that stand for the container, usable or in quarantine."""
        name = "" if tracked.wish.snapshot == "auto" else tracked.wish.snapshot
        return self._store.find(namespace=tracked.pod.namespace, key=identity.key, name=name)

    def _has_snapshot(self, tracked: Tracked, identity: Identity) -> bool:
        quarantine, code = self._store.quarantine, volumecontent.CODE
        ignores = tracked.wish.volume_content == "ignore"
        return any(
            self._trust.verdict(each).trusted and not quarantine.get(each.id)
            for each in self._like(tracked, identity)
            # A snapshot with another Secret does not fit this container, nor the next ones.
            if ignores or each.facts.get(code) == identity.facts.get(code)
        )

    def _speaks_against(self, tracked: Tracked, identity: Identity) -> str:
        """Returns why another capture would only bring the same failures, or an empty string.

        A new capture replaces a damaged snapshot. But if a whole snapshot cannot be restored, the
        daemon would capture the workload, and the restore would fail, again and again for ever.
        """
        for each in self._like(tracked, identity):
            record = self._store.quarantine.get(each.id)
            if record and not record.damaged and self._trust.verdict(each).trusted:
                return (
                    f"snapshot {each.id[:12]} of its like is in quarantine: {told(record)} Release "
                    f"it with `quickthaw quarantine release {each.id[:12]}`, or remove it with "
                    f"`quickthaw rm {each.id[:12]}`: then the next one is captured."
                )
        return ""

    async def _when_ready(self, tracked: Tracked, identity: Identity) -> None:
        try:
            tracked.become(State.WAITING)
            source = await asyncio.to_thread(self._capturing.source, tracked, identity)
            source.check()
            condition = tracked.wish.capture_when or SignalReady()
            await wait_until_ready(source, condition, within_s=self._config.readiness_timeout_s)
            await self._capture(tracked, identity)
        except QuickthawError as error:
            tracked.become(State.CAPTURE_FAILED, str(error))
            self._reporter.tell(capture_failed(tracked.subject, error))
        except Exception as error:
            # The border: a capture must not end the daemon, and its source runs on.
            tracked.become(State.CAPTURE_FAILED, f"{type(error).__name__}: {error}")
            log.exception("capture of container %s", tracked.container)
        finally:
            tracked.task = None

    async def _capture(self, tracked: Tracked, identity: Identity) -> Manifest:
        source = await self._capturing.prepared(tracked, identity)
        async with self._turn:
            tracked.become(State.CAPTURING)
            found, steps = await self._capturing.run(tracked, identity, source)
        tracked.snapshot = found.id
        tracked.become(State.CAPTURED)
        self._reporter.tell(
            Captured(
                subject=tracked.subject, snapshot=found.id, frozen_s=steps["frozen"],
                seconds=steps["total"],
            )
        )  # fmt: skip
        return found


def _are_alike(one: Identity, other: Identity) -> bool:
    """Whether a snapshot of `one` may serve for `other`."""
    code = volumecontent.CODE
    return one.key == other.key and one.facts.get(code) == other.facts.get(code)
