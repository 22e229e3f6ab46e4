"""Runs a capture in order: quiesce, dump, resume, and the snapshot's description.

The source goes on serving whatever happens: before anything else, a frozen source is thawed and a
quiesced source is resumed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from shim.capture.dump import dump
from shim.contract import faults
from shim.contract.errors import CaptureFailed, GpuLost, NotCapturable, QuiesceFailed
from shim.contract.parts import PARTS
from shim.contract.paths import SNAPSHOT_CRIU
from shim.criu import images
from shim.integrity import tree
from shim.kernel.steps import Steps
from shim.kernel.stopping import Stop, Stopped
from shim.memory.copy.settle import settle
from shim.source import ghosts, opened, standstill
from shim.source.estimate import amount
from shim.source.source import own_freezer
from shim.source.toll import Toll
from shim.source.volumefiles import volume_files
from shim.workload import requests
from shim.workload.annotations import ExecCall

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from shim.capture.dump import Dumped
    from shim.gpu.payload import GpuPayload
    from shim.source.source import Source
    from shim.workload.annotations import Call

log = logging.getLogger(__name__)

_CALL_S = 60.0
_STUCK_S = 60.0
"""The limit for a thread from its cancellation on, for example to sync its writes."""
_EXIT_STUCK = 70
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Taken:
    """The content of staging. network: the manifest's object. sizes: bytes. steps: of `Steps`.

    volume_files, by_network: the facts `volume_files` and `descriptors`. gpus: what the snapshot
    says about CUDA processes, None without any.
    """

    network: dict[str, Any]
    sizes: dict[str, int]
    memory_bytes: int
    steps: dict[str, float]
    volume_files: dict[str, object]
    by_network: dict[str, object]
    gpus: GpuPayload | None = None


@dataclass(frozen=True, slots=True)
class Bounds:
    """stop: ends the capture, at its deadline or on request. frozen_s: the window's limit."""

    stop: Stop
    frozen_s: float


async def capture(
    source: Source,
    staging: Path,
    network: dict[str, Any],
    *,
    quiesce: Call | None,
    resume: Call | None,
    check_room: Callable[[], Awaitable[None]],
    bounds: Bounds,
) -> Taken:
    """Take everything of `source` into `staging`.

    network: the hook's record from the start of the container. check_room: called right before the
    first copy. Raises CaptureFailed; the source then runs as before. Cancelling tells the bounds'
    `stop`, and waits for the frozen window to end.
    """
    stop = bounds.stop
    source.check()
    toll = await asyncio.to_thread(_before, source)
    steps = Steps()
    async with _quiesced(source, quiesce, resume):
        await check_room()
        with _border(source.container):
            faults.point("capture.quiesced", source.container)
            # A daemon that must stop must not leave a container frozen.
            dumped, gpus = await finished(
                asyncio.to_thread(_dumped, source, staging, steps, stop, bounds.frozen_s), stop
            )
            faults.point("capture.thawed", source.container)
    faults.point("capture.resumed", source.container)
    steps.add("total", steps.since, time.monotonic())
    with _border(source.container):
        taken = await finished(
            asyncio.to_thread(_described, source, staging, network, steps, dumped, stop), stop
        )
        await asyncio.to_thread(toll.check)
    return replace(taken, gpus=gpus)


def _dumped(
    source: Source, staging: Path, steps: Steps, stop: Stop, frozen_s: float
) -> tuple[Dumped, GpuPayload | None]:
    if source.gpus == ():
        return dump(source, staging, steps, stop, frozen_s), None
    from shim.capture import gpus  # late: most containers have none

    return gpus.dump_stopped(source, staging, steps, stop, frozen_s)


@contextmanager
def _border(container: str) -> Iterator[None]:
    """Raises CaptureFailed if the kernel refuses, an image of CRIU's is odd, or time is up."""
    try:
        yield
    except (OSError, ValueError, Stopped) as error:
        kind = "" if isinstance(error, Stopped) else f"{type(error).__name__}: "
        raise CaptureFailed(
            "cannot capture", about=container, why=f"{kind}{error}",
            do="The next pod like it is tried again.",
        ) from error  # fmt: skip


def _before(source: Source) -> Toll:
    """Look at the source before any change."""
    try:
        standstill.check(source, own_freezer(source).pids())
        return Toll(source)
    except (OSError, ValueError) as error:
        raise NotCapturable(
            "cannot capture", about=source.container,
            why=f"its processes cannot be looked at: {error}", do="Is it still running?",
        ) from error  # fmt: skip


async def finished(work: Awaitable[Result], stop: Stop | None = None) -> Result:
    """Wait until `work` has ended, even if cancelled meanwhile; then raise the cancellation.

    For threads, which cannot be cancelled: their resources must outlive them. stop: asks the thread
    to end; every thread with long work has a stop, and checks it at each step. A thread that hangs,
    because a disk does not answer, ends the daemon.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task], timeout=_STUCK_S if cancelled else None)
        except asyncio.CancelledError as again:  # a deadline, and then the container's end
            cancelled = again
            if stop:
                stop.tell()
        else:
            if not task.done():
                # The thread holds a turn and a staging directory for ever. Nothing in this process
                # can end the thread: systemd starts the next daemon, which takes over. Pods do not
                # notice.
                log.critical("a thread hangs: quickthawd ends. Is a disk or an NFS server away?")
                os._exit(_EXIT_STUCK)
    if cancelled is None:
        return task.result()
    # The look keeps asyncio from reporting the exception: nobody waits for it, unless our own act
    # ended the container and so caused the cancellation.
    if not task.cancelled() and isinstance(error := task.exception(), GpuLost):
        raise error from cancelled
    raise cancelled


@asynccontextmanager
async def _quiesced(
    source: Source, quiesce: Call | None, resume: Call | None
) -> AsyncIterator[None]:
    is_lost = False
    try:
        await _call(source, quiesce)
        yield
    except GpuLost:  # it was killed: nobody is there to be resumed
        is_lost = True
        raise
    finally:
        if not is_lost:
            await _call(source, resume)


async def _call(source: Source, wanted: Call | None) -> None:
    if wanted is None:
        return
    try:
        if isinstance(wanted, ExecCall):
            await requests.execute(source, wanted.argv, within_s=_CALL_S)
        else:
            await requests.request(
                source, "http", wanted.port, method=wanted.method, target=wanted.path,
                within_s=_CALL_S,
            )  # fmt: skip
    except requests.WorkloadRefused as error:
        raise QuiesceFailed(
            "the quiesce or resume call failed", about=source.container, why=str(error),
            do="Check the pod's quickthaw.io/quiesce and resume annotations.",
        ) from error  # fmt: skip


def _described(
    source: Source,
    staging: Path,
    network: dict[str, Any],
    steps: Steps,
    dumped: Dumped,
    stop: Stop,
) -> Taken:
    criu_images = staging / SNAPSHOT_CRIU
    by_network = opened.check_images(source, criu_images, dumped.opened, dumped.has, network)
    addresses = [
        str(entry["address"])
        for entry in network.get("addresses") or ()
        if entry.get("link") != "lo" and entry.get("scope") == 0
    ]
    stop.check()
    ghosts.check(source, staging / SNAPSHOT_CRIU)
    settle(staging, dumped.memory)
    stop.check()
    faults.point("capture.settled", source.container)
    _check_small_images(source, criu_images)
    patches = images.make_patchable(staging / SNAPSHOT_CRIU, addresses)
    described = {
        **network,
        "bound_addresses": sorted({address for address, _ in patches}),
        "patches": [{"address": address, "offsets": offsets} for address, offsets in patches],
    }
    parts = {part: amount(str(staging / part.name), stop, limited=False) for part in PARTS}
    pages = sum(path.stat().st_size for path in (staging / SNAPSHOT_CRIU).glob("*pages-*.img"))
    in_memory = sum(found.content_bytes for part, found in parts.items() if part.is_memory)
    sizes = {part.name: found.size_bytes for part, found in parts.items()}
    sizes["entries"] = sum(found.entries for found in parts.values())
    faults.point("capture.described")
    files = volume_files(source, criu_images, dumped.opened, dumped.has)
    return Taken(described, sizes, pages + in_memory, steps, files, by_network)


def _check_small_images(source: Source, directory: Path) -> None:
    """Raises NotCapturable for too much: a restore has these images in the node's memory."""
    sizes = [(path.name, path.stat().st_size) for path in directory.iterdir()]
    found = sum(size for name, size in sizes if not tree.is_big_image(name, size))
    if found > tree.MOST_IMAGE_BYTES:
        raise NotCapturable(
            "cannot capture", about=source.container,
            why=f"CRIU's small images are {found} bytes, {tree.MOST_IMAGE_BYTES} are allowed",
            do="It has very many deleted files open, or processes, areas and descriptors.",
        )  # fmt: skip
