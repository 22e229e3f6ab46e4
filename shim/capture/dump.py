"""What is taken of a container, most of it while it is frozen: CRIU's images, memory,
rootfs, /dev/shm.

Blocking: runs in a thread of the daemon's. The order is what keeps the snapshot consistent.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from shim.capture import within
from shim.capture.checkpoint import checkpoint
from shim.capture.deleted import SHM, Copied, Remapped, give_links, inodes_by_lost_name, names_in
from shim.capture.memorycopy import MemoryCopy
from shim.capture.source import frozen
from shim.contract import faults
from shim.contract.errors import ContainerBusy, MemoryNotCopied, RootfsNotCopied
from shim.contract.paths import (
    CONTAINER_CRIU_CONF,
    CONTAINER_FILLING,
    SNAPSHOT_CRIU,
    SNAPSHOT_MEMORY,
    SNAPSHOT_ROOTFS,
    SNAPSHOT_SHM,
    SNAPSHOTS,
)
from shim.criu import images, options, passcred
from shim.kernel.cgroup import Freezer
from shim.kernel.lineage import strangers
from shim.kernel.shared_mappings import writable_shared_files
from shim.rootfs import overlay
from shim.rootfs.devshm import ShmCopy
from shim.rootfs.diff import DiffCopy

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from shim.capture.copied import CopiedMemory
    from shim.capture.source import Source
    from shim.kernel.stopping import Stop

_MUCH_BYTES = 32 << 20
_SETTLE_S = 2.1
_SPARE_S = 1.0
"""The guard thaws when we should have been done: not before a hanging CRIU is killed."""


@contextlib.contextmanager
def _step(steps: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    try:
        yield
    finally:
        steps[name] = round(time.monotonic() - began, 4)


def dump(source: Source, staging: Path, steps: dict[str, float], stop: Stop) -> CopiedMemory:
    """Fill `staging` with criu/, rootfs/ and shm/, and the files of data of memory/.

    The container runs again when this returns: the copies of its memory.

    steps: seconds by step, filled while it runs. stop: ends it, at its deadline or when told.
    Raises CaptureFailed of the step's kind; Stopped.
    """
    until = stop.until
    _check_filled(source)
    mounted = _overlay(source)
    # A restored container has the diff of its own snapshot below its upperdir.
    diffs = [path for path in mounted.absolute_lowerdirs() if path.startswith(f"{SNAPSHOTS}/")]
    base = [path for path in mounted.absolute_lowerdirs() if path not in diffs]
    layers = [mounted.upperdir, *diffs]
    for name in (SNAPSHOT_CRIU, SNAPSHOT_ROOTFS, SNAPSHOT_SHM, SNAPSHOT_MEMORY):
        (staging / name).mkdir(mode=0o700)
    options.write(str(source.private / CONTAINER_CRIU_CONF))
    with DiffCopy(
        layers, str(staging / SNAPSHOT_ROOTFS), container=source.container, base=base,
        userxattr=mounted.has_userxattr(), stop=stop,
    ) as diff, ShmCopy(
        source.shm, str(staging / SNAPSHOT_SHM), container=source.container, stop=stop
    ) as shm, MemoryCopy(source.pid, staging / SNAPSHOT_MEMORY, until, stop) as memory:  # fmt: skip
        with _step(steps, "precopy"):
            _precopy(diff, stop)
            shm.precopy()
        faults.point("capture.precopied", source.container)
        with _step(steps, "memory"), _of_memory(source):
            memory.precopy(Freezer.of(source.pid).pids())
        faults.point("capture.memory.precopied", source.container)
        with (
            passcred.answered(source.pid) as unanswered,
            frozen(source, steps, until=until + _SPARE_S) as freezer,
        ):
            faults.point("capture.frozen", source.container)
            pids = freezer.pids()
            _check_alone(source, pids)
            with _of_memory(source):
                shared = memory.compare(pids)
            within.check(source, pids)
            lost = inodes_by_lost_name(pids)
            with _step(steps, "criu"):
                checkpoint(
                    source, staging / SNAPSHOT_CRIU, len(pids), shared, unanswered=unanswered,
                    until=until,
                )  # fmt: skip
            faults.point("capture.dumped", source.container)
            with _step(steps, "memory_rest"), _of_memory(source):
                copied = memory.complete(staging / SNAPSHOT_CRIU)
            faults.point("capture.memory.copied", source.container)
            with _step(steps, "rootfs"):
                # It meets each file once anyway, and so finds the names of those that lost theirs.
                diff.finish(always_paths=writable_shared_files(pids), wanted=lost.values())
            faults.point("capture.rootfs.copied", source.container)
            with _step(steps, "shm"):
                shm.finish()
            faults.point("capture.shm.copied", source.container)
            names = _names(source, staging, lost, diff, stop)
        # In copies, which nobody changes: the container runs again.
        give_links(names, lost, source.container, stop)
    return copied


def _names(
    source: Source, staging: Path, lost: Mapping[str, int], diff: DiffCopy, stop: Stop
) -> Remapped:
    """What is left of the names of files that lost one. While nothing changes."""
    remaps = images.link_remaps(staging / SNAPSHOT_CRIU)
    in_shm = names_in(SHM, source.shm, remaps, lost, stop)
    return Remapped(
        remaps,
        [
            Copied(SHM, in_shm, str(staging / SNAPSHOT_SHM)),
            Copied("", diff.names, str(staging / SNAPSHOT_ROOTFS)),
        ],
    )


@contextlib.contextmanager
def _of_memory(source: Source) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise MemoryNotCopied(
            "cannot copy the memory", container=source.container, why=str(error),
            do="The next pod like it is tried again.",
        ) from error  # fmt: skip


def _check_alone(source: Source, pids: Sequence[int]) -> None:
    """CRIU dumps a tree: a process whose parent is outside of the container is in its way."""
    if found := strangers(pids, source.pid):
        raise ContainerBusy(
            "cannot capture now", container=source.container,
            why=f"{len(found)} processes of `exec` are in it", do="It is tried again.",
        )  # fmt: skip


def _check_filled(source: Source) -> None:
    """What a page server has not filled yet CRIU would take for zeros."""
    if (source.private / CONTAINER_FILLING).exists():
        raise ContainerBusy(
            "cannot capture now", container=source.container,
            why="its memory is still being filled after its restore", do="It is tried again.",
        )  # fmt: skip


def _precopy(diff: DiffCopy, stop: Stop) -> None:
    """Copy what can be copied while the container runs.

    What was written in the last two seconds may be written again unseen, so that it would be
    copied once more in the frozen window: when that is much, it is given time to settle.
    """
    if diff.precopy().unsettled_bytes > _MUCH_BYTES:
        stop.sleep(_SETTLE_S)
        diff.precopy()


def _overlay(source: Source) -> overlay.Overlay:
    try:
        return overlay.read_overlay(source.rootfs)
    except (OSError, ValueError) as error:
        raise RootfsNotCopied(
            "cannot find the container's upperdir", container=source.container, why=str(error),
            do="Is the node's snapshotter overlayfs?",
        ) from error  # fmt: skip
