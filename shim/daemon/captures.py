"""Runs captures: a task for each container that waits for its readiness or is being captured.

Only one container is captured for a key: while it waits or is captured, others like it only run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shim import version
from shim.capture import gpus
from shim.capture.sequence import Bounds, capture, finished
from shim.contract import faults, jsontext
from shim.contract import manifest as manifests
from shim.contract.errors import (
    CaptureFailed,
    ContainerBusy,
    GpuLost,
    NotCapturable,
    QuickthawError,
    SourceHarmed,
    too_big,
)
from shim.contract.limits import TooMuch
from shim.contract.names import HostPid
from shim.contract.paths import PREFIX, RUNTIME, SWAPPED
from shim.daemon import content, gpucaptures
from shim.daemon.containerd import ContainerdRefused
from shim.daemon.room import Room
from shim.daemon.tracked import State
from shim.gate import gpu, volumecontent
from shim.gate.checks import WITHIN_SPEC
from shim.kernel.stopping import Stop, Stopped
from shim.node import tool
from shim.node.facts import criu_version
from shim.oci.bundle import Bundle
from shim.report.records import Captured, CaptureRefused, capture_failed
from shim.source import record
from shim.source.estimate import Amount, estimate
from shim.source.source import Source, thaw_left
from shim.store.listing import told
from shim.workload.annotations import SignalReady
from shim.workload.readiness import wait_until_ready

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from shim.capture.sequence import Taken
    from shim.contract.manifest import File, Manifest
    from shim.daemon.config import Config
    from shim.daemon.decision import Decider
    from shim.daemon.registry import Registry
    from shim.daemon.tracked import Identity, Tracked
    from shim.report.reporter import Reporter
    from shim.store.store import Store
    from shim.trust.verdict import Trust

log = logging.getLogger(__name__)

_TOOL_S = 10.0
_ORPHAN_EVERY_S = 0.2
"""Seconds between two looks whether the checkpoint of a killed daemon has ended."""
_BUSY_TRIES, _BUSY_S = 30, 0.5
"""How often a capture gives way to processes of `exec`, and for how many seconds each time."""


class Captures:
    """Starts, bounds and cancels captures. Call all methods on the event loop."""

    def __init__(
        self, config: Config, store: Store, trust: Trust, registry: Registry, decider: Decider,
        reporter: Reporter, tasks: asyncio.TaskGroup,
    ) -> None:  # fmt: skip
        self._config, self._store, self._registry = config, store, registry
        self._trust = trust
        self._decider, self._reporter, self._tasks = decider, reporter, tasks
        self._room = Room(config, store, registry, reporter)
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
                "cannot capture", container=tracked.container,
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
                "cannot capture", container=tracked.container,
                why="the container ended during its capture",
                do="Look for why it ended: `kubectl describe pod` tells of the OOM killer.",
            ) from error  # fmt: skip
        finally:
            tracked.task = None

    async def gpu_findings(self, tracked: Tracked, identity: Identity) -> list[dict[str, object]]:
        """Returns findings on a running container's GPUs; empty without any GPU in use."""
        if not tracked.pid:
            return []
        return await gpucaptures.findings(lambda: self._source(tracked, identity))

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
            tracked.container, lambda: self._source(tracked, identity)
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
            source = await asyncio.to_thread(self._source, tracked, identity)
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
        source = await asyncio.to_thread(self._source, tracked, identity)
        self._trust.check_signing(tracked.container)
        await self._note_company(tracked)
        async with self._turn:
            tracked.become(State.CAPTURING)
            try:
                async with asyncio.timeout(self._config.capture_timeout_s):
                    found, steps = await self._undisturbed(tracked, identity, source)
            except TimeoutError as error:
                raise CaptureFailed(
                    "cannot capture", container=tracked.container,
                    why=f"it took longer than {self._config.capture_timeout_s:g} s",
                    do="Find the slow part: the workload's own calls, or the disk of the store.",
                ) from error  # fmt: skip
            except asyncio.CancelledError as error:
                if lost := gpucaptures.lost_behind(error):
                    raise lost from None
                raise
            except (OSError, Stopped) as error:
                raise CaptureFailed(
                    "cannot capture", container=tracked.container, why=str(error),
                    do="The next pod like it is tried again.",
                ) from error  # fmt: skip
        tracked.snapshot = found.id
        tracked.become(State.CAPTURED)
        self._reporter.tell(
            Captured(
                subject=tracked.subject, snapshot=found.id, frozen_s=steps["frozen"],
                seconds=steps["total"],
            )
        )  # fmt: skip
        return found

    async def _note_company(self, tracked: Tracked) -> None:
        """Record whether later containers, unseen by us, may have made files in /dev/shm."""
        if record.has(tracked.container, record.OTHERS):
            return
        try:
            if await self._decider.later_ones(tracked):
                record.write(tracked.container, record.OTHERS, record.NOTHING_KNOWN)
        except (ContainerdRefused, OSError) as error:
            raise NotCapturable(
                "cannot capture", container=tracked.container,
                why=f"nobody tells which containers its pod has had: {error}",
                do="Is containerd there?",
            ) from error  # fmt: skip

    async def _undisturbed(
        self, tracked: Tracked, identity: Identity, source: Source
    ) -> tuple[Manifest, dict[str, float]]:
        """Capture while no process of `exec` is in the container. Retries: probes come and go."""
        for _ in range(_BUSY_TRIES):
            with contextlib.suppress(ContainerBusy):
                return await self._once(tracked, identity, source)
            await asyncio.sleep(_BUSY_S)
        return await self._once(tracked, identity, source)

    async def _once(
        self, tracked: Tracked, identity: Identity, source: Source
    ) -> tuple[Manifest, dict[str, float]]:
        faults.point("capture.ready", source.container)
        stop = Stop(time.monotonic() + self._config.capture_timeout_s)
        try:
            needed = await finished(asyncio.to_thread(estimate, source, stop), stop)
        except TooMuch as error:
            raise too_big(source.container, error) from error
        except (OSError, ValueError) as error:
            raise NotCapturable(
                "cannot capture", container=source.container,
                why=f"its size cannot be estimated: {error}", do="Is it still running?",
            ) from error  # fmt: skip
        await content.check(tracked, identity, source.spec)
        if source.gpus != ():
            staged = await asyncio.to_thread(gpus.check, source)
            needed = needed.plus(Amount(staged, 0))
        async with self._room.reserved(source.container, tracked.pod.namespace, needed):
            return await self._into_staging(tracked, identity, source, needed, stop)

    @contextlib.asynccontextmanager
    async def _staged(self) -> AsyncIterator[Path]:
        """Yields a staging directory. A thread removes it: the directory may hold many files."""
        staging = self._store.begin()
        try:
            yield staging
        finally:
            await finished(asyncio.to_thread(self._store.discard, staging))

    async def _into_staging(
        self, tracked: Tracked, identity: Identity, source: Source, needed: Amount, stop: Stop
    ) -> tuple[Manifest, dict[str, float]]:
        async with self._staged() as staging:
            network = await _network(source)
            faults.point("capture.network.read", source.container)
            whose = (source.container, tracked.pod.namespace)
            async with self._room.followed(*whose):
                taken = await capture(
                    source, staging, network,
                    quiesce=tracked.wish.quiesce, resume=tracked.wish.resume,
                    check_room=lambda: self._room.check(*whose),
                    bounds=Bounds(stop, self._config.frozen_limit_s),
                )  # fmt: skip
            await content.check(tracked, identity, source.spec)
            await self._room.admit(*whose, needed, _amount(taken.sizes))
            software = await _software(source.runtime, self._config.criu)
            # To its end even when cancelled: nobody may remove a snapshot during its publication.
            found = await finished(
                asyncio.to_thread(
                    self._store.publish, staging,
                    lambda files: _describe(tracked, identity, taken, software, files), stop,
                ),
                stop,
            )  # fmt: skip
        return found, taken.steps

    def _source(self, tracked: Tracked, identity: Identity) -> Source:
        config = self._config
        bundle = (
            f"{config.containerd_state}/io.containerd.runtime.v2.task/"
            f"{config.containerd_namespace}/{tracked.container}"
        )
        spec = Bundle(bundle).spec
        runtime = (_runtime(), "--root", f"{config.runtime_root}/{config.containerd_namespace}")
        found = gpu.chosen(spec, identity.request.node.gpus)
        return Source(
            tracked.container, HostPid(tracked.pid), bundle, spec, runtime, identity.log_path,
            tracked.held, None if found is None else tuple(found),
            identity.request.node.criu,
        )  # fmt: skip


def _are_alike(one: Identity, other: Identity) -> bool:
    """Whether a snapshot of `one` may serve for `other`."""
    code = volumecontent.CODE
    return one.key == other.key and one.facts.get(code) == other.facts.get(code)


def _runtime() -> str:
    return Path(RUNTIME).read_text().strip() or "runc"


async def _network(source: Source) -> dict[str, Any]:
    """Returns addresses, routes, MTU and sysctls of the container's network namespace."""
    try:
        network_fd = source.process.network_fd()
        argv = [f"{PREFIX}/bin/quickthaw-hook", "record", str(network_fd), str(os.getpid())]
        ended = await tool.run_async(argv, within_s=_TOOL_S, pass_fds=(network_fd,))
        if ended.status == 0:
            found: dict[str, Any] = json.loads(ended.output)
            return found
        why = ended.tail
    except (OSError, TimeoutError, ValueError) as error:
        why = str(error)
    raise NotCapturable(
        "cannot capture", container=source.container, why=f"its network cannot be read: {why}",
        do="Is the container still running?",
    )  # fmt: skip


async def _software(runtime: tuple[str, ...], criu: str) -> dict[str, str]:
    """Returns the versions of the software that makes the snapshot."""
    system = os.uname()
    ended = await tool.run_async([runtime[0], "--version"], within_s=_TOOL_S)
    return {
        "criu": await criu_version(criu), "runtime": ended.tail.partition("\n")[0],
        "quickthaw": version.VERSION, "kernel": system.release, "arch": system.machine,
    }  # fmt: skip


def _amount(sizes: Mapping[str, int]) -> Amount:
    """Returns the bytes and inodes of a snapshot. sizes: as in the manifest."""
    return Amount(sum(sizes.values()) - sizes["entries"], sizes["entries"])


def _describe(
    tracked: Tracked, identity: Identity, taken: Taken, software: dict[str, str],
    files: tuple[File, ...],
) -> Manifest:  # fmt: skip
    name = tracked.wish.snapshot or tracked.wish.restore
    return manifests.build(
        name="" if name == "auto" or ":" in name else name,
        key=identity.key,
        created_at=time.time(),
        source={
            "namespace": tracked.pod.namespace, "pod": tracked.pod.name,
            "pod_uid": tracked.pod.uid, "container": tracked.name,
            "container_id": tracked.container, "node": os.uname().nodename,
            "image": identity.image, "image_digest": identity.image_digest,
            "command": list(identity.command),
        },
        software=software,
        facts={
            **identity.facts, "processes": WITHIN_SPEC,
            "descriptors": jsontext.canonical(taken.by_network),
            "volume_files": jsontext.canonical(taken.volume_files),
            **gpucaptures.facts_of(taken),
        },
        network=taken.network,
        files=files,
        sizes=taken.sizes | {
            part: taken.sizes[part] + file.size
            for part, file in zip(manifests.LISTINGS, files, strict=True)
        },
        timings=taken.steps,
        requires={"memory_bytes": taken.memory_bytes},
    )  # fmt: skip
