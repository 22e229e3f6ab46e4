"""Dumps a container, most of it in the frozen window: CRIU's images, memory, rootfs, /dev/shm.

Blocking: runs in a thread of the daemon. The order keeps the snapshot consistent.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shim.capture.checkpoint import checkpoint
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
from shim.criu import advice, images, ipcobjects, options, passcred
from shim.gate.descriptors import reachable
from shim.kernel.lineage import strangers
from shim.kernel.shared_mappings import writable_shared_files
from shim.memory.copy.memorycopy import MemoryCopy
from shim.rootfs import overlay
from shim.rootfs.diff import DiffCopy
from shim.shm.devshm import ShmCopy
from shim.source import excess, opened, standstill
from shim.source.belongings import Belongings, checked
from shim.source.deleted import SHM, Copied, Remapped, give_links, names_in
from shim.source.source import frozen, own_freezer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from shim.kernel.stopping import Stop
    from shim.memory.copy.copied import CopiedMemory
    from shim.source.opened import Opened
    from shim.source.source import Source

_MUCH_BYTES = 32 << 20
_SETTLE_S = 2.1
_SPARE_S = 1.0
_LATE = "the copies of its files took longer than its frozen window had left"
"""The guard thaws when we should have been done: not before a hanging CRIU is killed."""
_FROZEN_S = 10.0
_COMPARED_BYTES_PER_S = 512 << 20
"""The speed of a slow machine: one processor beside CRIU, memory that many processes share."""


@contextlib.contextmanager
def _step(steps: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    try:
        yield
    finally:
        steps[name] = round(time.monotonic() - began, 4)


@dataclass(frozen=True, slots=True)
class Dumped:
    """The findings of the frozen window that are not in `staging`.

    memory: the copies of the processes' memory. opened: all that they had open. has: the
    capabilities that the container's spec reaches, as a mask.
    """

    memory: CopiedMemory
    opened: list[Opened]
    has: int


def dump(
    source: Source, staging: Path, steps: dict[str, float], stop: Stop, frozen_limit_s: float
) -> Dumped:
    """Fill `staging` with criu/, rootfs/ and shm/, and the data files of memory/.

    The container runs again when this returns.

    steps: seconds by step, filled while this runs. stop: ends the dump, at its deadline or on
    request. frozen_limit_s: the longest frozen window. Raises CaptureFailed of the step's kind;
    Stopped.
    """
    _check_filled(source)
    own = checked(source, stop)
    mounted = _overlay(source)
    layers, base = _layers(mounted)
    for name in (SNAPSHOT_CRIU, SNAPSHOT_ROOTFS, SNAPSHOT_SHM, SNAPSHOT_MEMORY):
        (staging / name).mkdir(mode=0o700)
    options.write(str(source.private / CONTAINER_CRIU_CONF))
    with DiffCopy(
        layers, str(staging / SNAPSHOT_ROOTFS), container=source.container, base=base,
        userxattr=mounted.has_userxattr(), stop=stop,
    ) as diff, ShmCopy(
        source.shm, str(staging / SNAPSHOT_SHM), container=source.container, stop=stop, own=own
    ) as shm, MemoryCopy(
        source.pid, staging / SNAPSHOT_MEMORY, stop.until, stop
    ) as memory:  # fmt: skip
        with _step(steps, "precopy"):
            _precopy(diff, stop)
            _precopy_shm(source, own, shm)
        faults.point("capture.precopied", source.container)
        with _step(steps, "memory"), _of_memory(source):
            memory.precopy(own_freezer(source).pids())
        faults.point("capture.memory.precopied", source.container)
        until = _until_frozen(source, memory.size, stop.until, frozen_limit_s)
        with (
            passcred.answered(source.pid) as unanswered,
            frozen(source, steps, until=until + _SPARE_S) as freezer,
            stop.sooner(until, _LATE),
        ):
            faults.point("capture.frozen", source.container)
            pids = freezer.pids()
            _check_alone(source, pids)
            with _of_memory(source):
                shared = memory.compare(pids, until, areas=not advice.is_known_to(source.criu))
            found, has = _looked_at(source, pids, stop)
            lost = opened.lost_names(found)
            foreign = own.foreign_objects(pids)
            with _step(steps, "criu"):
                checkpoint(
                    source, staging / SNAPSHOT_CRIU, len(pids),
                    shared.union(ipcobjects.segments(foreign)), unanswered=unanswered,
                    until=until, thaw=freezer.thaw,
                )  # fmt: skip
            faults.point("capture.dumped", source.container)
            with _step(steps, "memory_rest"), _of_memory(source):
                ipcobjects.leave_out(staging / SNAPSHOT_CRIU, foreign)
                copied = memory.complete(staging / SNAPSHOT_CRIU)
            faults.point("capture.memory.copied", source.container)
            with _step(steps, "rootfs"):
                # This walk meets each file once anyway, so it also finds other names of files that
                # lost a name.
                diff.finish(always_paths=writable_shared_files(pids), wanted=lost.values())
            faults.point("capture.rootfs.copied", source.container)
            with _step(steps, "shm"):
                shm.finish()
            faults.point("capture.shm.copied", source.container)
            names = _names(source, staging, lost, diff, stop)
        # In copies, which nobody changes: the container runs again.
        give_links(names, lost, source.container, stop)
    return Dumped(copied, found, has)


def _names(
    source: Source, staging: Path, lost: Mapping[str, int], diff: DiffCopy, stop: Stop
) -> Remapped:
    """Returns the remaining names of files that lost a name. Call this while nothing changes."""
    remaps = images.link_remaps(staging / SNAPSHOT_CRIU)
    in_shm = names_in(SHM, source.shm, remaps, lost, stop)
    return Remapped(
        remaps,
        [
            Copied(SHM, in_shm, str(staging / SNAPSHOT_SHM)),
            Copied("", diff.names, str(staging / SNAPSHOT_ROOTFS)),
        ],
    )


def _until_frozen(source: Source, memory_bytes: int, until: float, limit_s: float) -> float:
    """Look again at the last moment. Returns the deadline of the steps in the frozen window.

    Raises NotCapturable, OSError, ValueError.
    """
    standstill.check(source, own_freezer(source).pids())
    return min(until, time.monotonic() + frozen_s(memory_bytes, limit_s) - _SPARE_S)


def frozen_s(memory_bytes: int, limit_s: float) -> float:
    """Returns the longest frozen window for so much memory: an estimate plus 10 s, or less."""
    return min(limit_s, memory_bytes / _COMPARED_BYTES_PER_S + _FROZEN_S)


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
    """Refuse processes from outside: CRIU dumps a tree, and a parent outside of it stops CRIU."""
    if found := strangers(pids, source.pid):
        raise ContainerBusy(
            "cannot capture now", container=source.container,
            why=f"{len(found)} processes of `exec` are in it", do="It is tried again.",
        )  # fmt: skip


def _looked_at(
    source: Source, pids: Sequence[int], stop: Stop
) -> tuple[list[Opened], int]:  # fmt: skip
    """Returns all that the processes have open, and the capabilities that the spec reaches.

    Raises NotCapturable for a process or descriptor with more power than the spec gives.
    """
    excess.check(source, pids)
    has = reachable(source.spec, excess.permitted(pids))
    found = opened.look(source, pids, stop)
    opened.check(source, found, has)
    return found, has


def _check_filled(source: Source) -> None:
    """Refuse while memory is being filled: CRIU would dump missing pages as zeros."""
    if (source.private / CONTAINER_FILLING).exists():
        raise ContainerBusy(
            "cannot capture now", container=source.container,
            why="its memory is still being filled after its restore", do="It is tried again.",
        )  # fmt: skip


def _precopy(diff: DiffCopy, stop: Stop) -> None:
    """Copy as much as possible while the container runs.

    Files written in the last two seconds may change again unseen, and the frozen window would copy
    them once more: if they are large, wait until they settle, and copy them again.
    """
    if diff.precopy().unsettled_bytes > _MUCH_BYTES:
        stop.sleep(_SETTLE_S)
        diff.precopy()


def _precopy_shm(source: Source, own: Belongings, shm: ShmCopy) -> None:
    own.looked_at(own_freezer(source).pids())
    shm.precopy()


def _layers(mounted: overlay.Overlay) -> tuple[list[str], list[str]]:
    """Returns the layers to copy, the topmost first, and the image's layers below.

    A restored container has the diff of its own snapshot below its upperdir.
    """
    lower = mounted.absolute_lowerdirs()
    diffs = [path for path in lower if path.startswith(f"{SNAPSHOTS}/")]
    return [mounted.upperdir, *diffs], [path for path in lower if path not in diffs]


def _overlay(source: Source) -> overlay.Overlay:
    try:
        return overlay.read_overlay(source.rootfs)
    except (OSError, ValueError) as error:
        raise RootfsNotCopied(
            "cannot find the container's upperdir", container=source.container, why=str(error),
            do="Is the node's snapshotter overlayfs?",
        ) from error  # fmt: skip
