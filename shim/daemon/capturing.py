"""Does one capture, from the running container to the manifest of the published snapshot.

`shim.daemon.captures` decides which container is captured, and when.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shim import version
from shim.capture import gpus
from shim.capture.sequence import Bounds, capture, finished
from shim.contract import faults, jsontext
from shim.contract import manifest as manifests
from shim.contract.errors import CaptureFailed, ContainerBusy, NotCapturable, too_big
from shim.contract.limits import TooMuch
from shim.contract.parts import PARTS
from shim.contract.paths import HOOK, RUNTIME
from shim.daemon import content, gpucaptures
from shim.daemon.containerd import ContainerdRefused
from shim.gate import gpu
from shim.gate.checks import WITHIN_SPEC
from shim.kernel.stopping import Stop, Stopped
from shim.node import tool
from shim.node.facts import criu_version
from shim.oci.bundle import Bundle
from shim.source import record
from shim.source.estimate import Amount, estimate
from shim.source.source import Source

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from shim.capture.sequence import Taken
    from shim.contract.manifest import File, Manifest
    from shim.daemon.config import Config
    from shim.daemon.decision import Decider
    from shim.daemon.room import Room
    from shim.daemon.tracked import Identity, Tracked
    from shim.store.store import Store
    from shim.trust.verdict import Trust

_TOOL_S = 10.0
_BUSY_TRIES, _BUSY_S = 30, 0.5
"""How often a capture gives way to processes of `exec`, and for how many seconds each time."""


class Capturing:
    """Does captures, and keeps no state between them. Call all coroutines on the event loop."""

    def __init__(
        self, config: Config, store: Store, trust: Trust, decider: Decider, room: Room
    ) -> None:
        self._config, self._store, self._trust = config, store, trust
        self._decider, self._room = decider, room

    async def prepared(self, tracked: Tracked, identity: Identity) -> Source:
        """Returns the container as a source, before its capture waits for a turn.

        Raises NotCapturable, KeyRefused, OSError, ValueError.
        """
        source = await asyncio.to_thread(self.source, tracked, identity)
        self._trust.check_signing(tracked.container)
        await self._note_company(tracked)
        return source

    async def run(
        self, tracked: Tracked, identity: Identity, source: Source
    ) -> tuple[Manifest, dict[str, float]]:
        """Returns the published snapshot, and the seconds of each step. Raises CaptureFailed.

        Cancelling waits until the source runs again and staging is empty.
        """
        try:
            async with asyncio.timeout(self._config.capture_timeout_s):
                return await self._undisturbed(tracked, identity, source)
        except TimeoutError as error:
            raise CaptureFailed(
                "cannot capture", about=tracked.container,
                why=f"it took longer than {self._config.capture_timeout_s:g} s",
                do="Find the slow part: the workload's own calls, or the disk of the store.",
            ) from error  # fmt: skip
        except asyncio.CancelledError as error:
            if lost := gpucaptures.lost_behind(error):
                raise lost from None
            raise
        except (OSError, Stopped) as error:
            raise CaptureFailed(
                "cannot capture", about=tracked.container, why=str(error),
                do="The next pod like it is tried again.",
            ) from error  # fmt: skip

    def source(self, tracked: Tracked, identity: Identity) -> Source:
        """Returns the container as a source. Blocking: reads its spec from the disk.

        Raises OSError, ValueError.
        """
        config = self._config
        bundle = (
            f"{config.containerd_state}/io.containerd.runtime.v2.task/"
            f"{config.containerd_namespace}/{tracked.container}"
        )
        spec = Bundle(bundle).spec
        runtime = (_runtime(), "--root", f"{config.runtime_root}/{config.containerd_namespace}")
        found = gpu.chosen(spec, identity.request.node.gpus)
        return Source(
            tracked.container, tracked.pid, bundle, spec, runtime, identity.log_path,
            tracked.held, None if found is None else tuple(found),
            identity.request.node.criu,
        )  # fmt: skip

    async def _note_company(self, tracked: Tracked) -> None:
        """Record whether later containers, unseen by us, may have made files in /dev/shm."""
        if record.has(tracked.container, record.OTHERS):
            return
        try:
            if await self._decider.later_ones(tracked):
                record.write(tracked.container, record.OTHERS, record.NOTHING_KNOWN)
        except (ContainerdRefused, OSError) as error:
            raise NotCapturable(
                "cannot capture", about=tracked.container,
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
                "cannot capture", about=source.container,
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


def _runtime() -> str:
    return Path(RUNTIME).read_text().strip() or "runc"


async def _network(source: Source) -> dict[str, Any]:
    """Returns addresses, routes, MTU and sysctls of the container's network namespace."""
    try:
        network_fd = source.process.network_fd()
        argv = [HOOK, "record", str(network_fd), str(os.getpid())]
        ended = await tool.run_async(argv, within_s=_TOOL_S, pass_fds=(network_fd,))
        if ended.status == 0:
            found: dict[str, Any] = jsontext.parse(ended.output)
            return found
        why = ended.tail
    except (OSError, TimeoutError, ValueError) as error:
        why = str(error)
    raise NotCapturable(
        "cannot capture", about=source.container, why=f"its network cannot be read: {why}",
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
    tracked: Tracked,
    identity: Identity,
    taken: Taken,
    software: dict[str, str],
    files: tuple[File, ...],
) -> Manifest:
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
            part.name: taken.sizes[part.name] + file.size
            for part, file in zip(PARTS, files, strict=True)
        },
        timings=taken.steps,
        requires={"memory_bytes": taken.memory_bytes},
    )  # fmt: skip
