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
from shim.contract.parts import PARTS
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
from shim.kernel.residence import resident_bytes
from shim.kernel.shared_mappings import writable_shared_files
from shim.memory.copy.memorycopy import MemoryCopy
from shim.rootfs import overlay
from shim.rootfs.diff import DiffCopy
from shim.shm.devshm import ShmCopy
from shim.source import excess, opened, standstill
from shim.source.belongings import Belongings, checked
from shim.source.deleted import SHM, Copied, Remapped, give_links, names_in
from shim.source.source import frozen, guarding, own_freezer
from shim.source.toll import outlives_criu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from shim.kernel.cgroup import Freezer
    from shim.kernel.steps import Steps
    from shim.kernel.stopping import Stop
    from shim.kernel.sysvipc import Object
    from shim.memory.copy.copied import CopiedMemory
    from shim.source.opened import Opened
    from shim.source.source import Source

    Parked = Callable[[], AbstractContextManager[None]]

_MUCH_BYTES = 32 << 20
_SETTLE_S = 2.1
_SPARE_S = 1.0
_LATE = "the copies of its files took longer than its frozen window had left"
"""The guard thaws when we should have been done: not before a hanging CRIU is killed."""
_FROZEN_S = 10.0
_MUCH_NEW_BYTES = 2 << 30
"""More new memory than this is copied before the freeze, and compared in the frozen window."""
_COMPARED_BYTES_PER_S = 512 << 20
"""The speed of a slow machine: one processor beside CRIU, memory that many processes share."""


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
    source: Source,
    staging: Path,
    steps: Steps,
    stop: Stop,
    frozen_limit_s: float,
    parked: Sequence[Parked] = (),
) -> Dumped:
    """Fill `staging` with criu/, rootfs/ and shm/, and the data files of memory/.

    The container runs again when this returns.

    steps: filled while this runs. stop: ends the dump, at its deadline or on request.
    frozen_limit_s: the longest frozen window. parked: what else stands still from the end of the
    pre-copy until the thaw: entered in this order, before the freeze, and left after the thaw.
    Raises CaptureFailed of the step's kind; Stopped.
    """
    _check_filled(source)
    own = checked(source, stop)
    mounted = _overlay(source)
    layers, base = _layers(mounted)
    for part in PARTS:
        (staging / part.name).mkdir(mode=0o700)
    options.write(str(source.private / CONTAINER_CRIU_CONF))
    with DiffCopy(
        layers, str(staging / SNAPSHOT_ROOTFS), container=source.container, base=base,
        userxattr=mounted.has_userxattr(), stop=stop,
    ) as diff, ShmCopy(
        source.shm, str(staging / SNAPSHOT_SHM), container=source.container, stop=stop, own=own
    ) as shm, MemoryCopy(
        source.pid, staging / SNAPSHOT_MEMORY, stop.until, stop
    ) as memory:  # fmt: skip
        dumping = _Dumping(source, staging, stop, own, diff, shm, memory)
        dumping.take(RUNNING, steps)
        with contextlib.ExitStack() as held:
            guard = held.enter_context(guarding(source, stop.until + _SPARE_S))
            for each in parked:
                held.enter_context(each())
            if parked:
                dumping.take(PARKED, steps)
            until = dumping.until_frozen(frozen_limit_s)
            pids = held.enter_context(outlives_criu(source))
            unanswered = held.enter_context(passcred.answered(source.pid))
            freezer = held.enter_context(frozen(source, guard, steps, until=until + _SPARE_S))
            held.enter_context(stop.sooner(until, _LATE))
            pids += freezer.pids()
            dumping.begin(freezer, pids, until, unanswered)
            dumping.take(FROZEN, steps)
        # In copies, which nobody changes: the container runs again.
        return dumping.end()


class _Dumping:
    """A dump under way: what its phases do, and hand to later ones."""

    def __init__(
        self,
        source: Source,
        staging: Path,
        stop: Stop,
        own: Belongings,
        diff: DiffCopy,
        shm: ShmCopy,
        memory: MemoryCopy,
    ) -> None:
        self._source, self._staging, self._stop, self._own = source, staging, stop, own
        self._diff, self._shm, self._memory = diff, shm, memory
        self._precopied_pids: list[int] = []
        self._resident = self._grown = 0
        self._found: list[Opened] = []
        self._lost: Mapping[str, int] = {}
        self._foreign: list[Object] = []
        self._pids: Sequence[int] = ()

    def take(self, phases: Sequence[Phase], steps: Steps) -> None:
        """Do them in their order, and time each."""
        for phase in phases:
            with steps.timed(phase.name):
                phase.do(self)

    # While the container runs

    def precopy_files(self) -> None:
        """Copy most of the files."""
        _precopy(self._diff, self._stop)
        _precopy_shm(self._source, self._own, self._shm)
        faults.point("capture.precopied", self._source.container)

    def precopy_memory(self) -> None:
        """Copy most of the memory."""
        self._precopied_pids = own_freezer(self._source).pids()
        with _of_memory(self._source):
            self._memory.precopy(self._precopied_pids)
        self._resident = resident_bytes(self._precopied_pids)
        faults.point("capture.memory.precopied", self._source.container)

    # While it is parked

    def precopy_new(self) -> None:
        """Copy memory that appeared since, if it is too much for the frozen window: the content of
        devices, which the driver has put there, and which nobody uses before the thaw.
        """
        self._grown = max(0, resident_bytes(self._precopied_pids) - self._resident)
        if self._grown > _MUCH_NEW_BYTES:
            with _of_memory(self._source):
                self._memory.precopy_new()
            self._grown = 0

    def until_frozen(self, limit_s: float) -> float:
        """Look again at the last moment. Returns the deadline of the steps in the frozen window.

        Raises NotCapturable, OSError, ValueError.
        """
        standstill.check(self._source, own_freezer(self._source).pids())
        window_s = frozen_s(self._memory.size + self._grown, limit_s)
        return min(self._stop.until, time.monotonic() + window_s - _SPARE_S)

    # While it is frozen

    def begin(self, freezer: Freezer, pids: Sequence[int], until: float, unanswered: str) -> None:
        """Begin to bring the copies up to date: all stands still."""
        faults.point("capture.frozen", self._source.container)
        self._freezer, self._until, self._unanswered = freezer, until, unanswered
        self._pids = pids
        _check_alone(self._source, self._pids)
        with _of_memory(self._source):
            self._shared = self._memory.compare(
                self._pids, until, with_new=self._grown > 0,
                areas=not advice.is_known_to(self._source.criu),
            )  # fmt: skip

    def look(self) -> None:
        """Compare the processes with their spec."""
        self._found, self._has = _looked_at(self._source, self._pids, self._stop)
        self._lost = opened.lost_names(self._found)
        self._foreign = self._own.foreign_objects(self._pids)

    def criu(self) -> None:
        """Have CRIU make its images."""
        checkpoint(
            self._source, self._staging / SNAPSHOT_CRIU, self._pids,
            self._shared.union(ipcobjects.segments(self._foreign)), unanswered=self._unanswered,
            until=self._until, thaw=self._freezer.thaw,
        )  # fmt: skip
        faults.point("capture.dumped", self._source.container)

    def complete_memory(self) -> None:
        """Copy the pages that CRIU lists and the copy lacks."""
        with _of_memory(self._source):
            ipcobjects.leave_out(self._staging / SNAPSHOT_CRIU, self._foreign)
            self._copied = self._memory.complete(self._staging / SNAPSHOT_CRIU)
        faults.point("capture.memory.copied", self._source.container)

    def complete_files(self) -> None:
        """Copy the changes of the root file system. This walk meets each file once anyway, so it
        also finds other names of files that lost a name.
        """
        shared = writable_shared_files(self._pids)
        self._diff.finish(always_paths=shared, wanted=self._lost.values())
        faults.point("capture.rootfs.copied", self._source.container)

    def complete_shm(self) -> None:
        """Copy the changes of /dev/shm."""
        self._shm.finish()
        faults.point("capture.shm.copied", self._source.container)

    def name(self) -> None:
        """Find the remaining names of files that lost a name, while nothing changes."""
        self._names = _names(self._source, self._staging, self._lost, self._diff, self._stop)

    def end(self) -> Dumped:
        """Give the copies of files the names that CRIU looks for."""
        give_links(self._names, self._lost, self._source.container, self._stop)
        return Dumped(self._copied, self._found, self._has)


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a dump. name: of its step."""

    name: str
    do: Callable[[_Dumping], None]


RUNNING = (Phase("precopy", _Dumping.precopy_files), Phase("memory", _Dumping.precopy_memory))
"""The container runs, and serves."""
PARKED = (Phase("memory_new", _Dumping.precopy_new),)
"""The caller's devices stand still: see `dump`. The container is not frozen."""
FROZEN = (
    Phase("look", _Dumping.look),
    Phase("criu", _Dumping.criu),
    Phase("memory_rest", _Dumping.complete_memory),
    Phase("rootfs", _Dumping.complete_files),
    Phase("shm", _Dumping.complete_shm),
    Phase("names", _Dumping.name),
)
"""The container is frozen."""


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


def frozen_s(memory_bytes: int, limit_s: float) -> float:
    """Returns the longest frozen window for so much memory: an estimate plus 10 s, or less."""
    return min(limit_s, memory_bytes / _COMPARED_BYTES_PER_S + _FROZEN_S)


@contextlib.contextmanager
def _of_memory(source: Source) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise MemoryNotCopied(
            "cannot copy the memory", about=source.container, why=str(error),
            do="The next pod like it is tried again.",
        ) from error  # fmt: skip


def _check_alone(source: Source, pids: Sequence[int]) -> None:
    """Refuse processes from outside: CRIU dumps a tree, and a parent outside of it stops CRIU."""
    if found := strangers(pids, source.pid):
        raise ContainerBusy(
            "cannot capture now", about=source.container,
            why=f"{len(found)} processes of `exec` are in it", do="It is tried again.",
        )  # fmt: skip


def _looked_at(source: Source, pids: Sequence[int], stop: Stop) -> tuple[list[Opened], int]:
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
            "cannot capture now", about=source.container,
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
            "cannot find the container's upperdir", about=source.container, why=str(error),
            do="Is the node's snapshotter overlayfs?",
        ) from error  # fmt: skip
