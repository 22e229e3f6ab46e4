"""What is taken of a container, most of it while it is frozen: CRIU's images, rootfs, /dev/shm.

Blocking: runs in a thread of the daemon's. The order is what keeps the snapshot consistent.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING

from shim.capture import tool, within
from shim.capture.deleted import Copied, give_links, inodes_by_lost_name
from shim.capture.source import frozen
from shim.contract import faults, journal
from shim.contract.errors import ContainerBusy, CriuDumpFailed, RootfsNotCopied
from shim.contract.paths import (
    CONTAINER_CRIU_CONF,
    CONTAINER_FILLING,
    CONTAINER_WORK,
    SNAPSHOT_CRIU,
    SNAPSHOT_ROOTFS,
    SNAPSHOT_SHM,
    SNAPSHOTS,
)
from shim.criu import images, options, passcred
from shim.criu.log import first_error
from shim.kernel.lineage import strangers
from shim.kernel.shared_mappings import writable_shared_files
from shim.rootfs import devshm, overlay
from shim.rootfs.diff import DiffCopy

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from shim.capture.source import Source

_DUMP_CONF = "criu-dump.conf"
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


def dump(source: Source, staging: Path, steps: dict[str, float], until: float) -> None:
    """Fill `staging` with criu/, rootfs/ and shm/. The container runs again when this returns.

    steps: seconds by step, filled while it runs. until: the deadline on
    `time.monotonic`. Raises CaptureFailed of the step's kind.
    """
    _check_filled(source)
    mounted = _overlay(source)
    # A restored container has the diff of its own snapshot below its upperdir.
    diffs = [path for path in mounted.absolute_lowerdirs() if path.startswith(f"{SNAPSHOTS}/")]
    base = [path for path in mounted.absolute_lowerdirs() if path not in diffs]
    layers = [mounted.upperdir, *diffs]
    for name in (SNAPSHOT_CRIU, SNAPSHOT_ROOTFS, SNAPSHOT_SHM):
        (staging / name).mkdir(mode=0o700)
    options.write(str(source.private / CONTAINER_CRIU_CONF))
    with DiffCopy(
        layers, str(staging / SNAPSHOT_ROOTFS), container=source.container, base=base,
        userxattr=mounted.has_userxattr(),
    ) as diff:  # fmt: skip
        with _step(steps, "precopy"):
            _precopy(diff)
        faults.point("capture.precopied", source.container)
        with (
            passcred.answered(source.pid) as unanswered,
            frozen(source, steps, until=until + _SPARE_S) as freezer,
        ):
            faults.point("capture.frozen", source.container)
            pids = freezer.pids()
            _check_alone(source, pids)
            within.check(source, pids)
            lost = inodes_by_lost_name(pids)
            with _step(steps, "criu"):
                _checkpoint(source, staging / SNAPSHOT_CRIU, unanswered, until)
            faults.point("capture.dumped", source.container)
            with _step(steps, "rootfs"):
                diff.finish(always_paths=writable_shared_files(pids))
            faults.point("capture.rootfs.copied", source.container)
            with _step(steps, "shm"):
                _copy_shm(source, staging / SNAPSHOT_SHM)
            faults.point("capture.shm.copied", source.container)
            copied = [
                Copied("dev/shm/", source.shm, str(staging / SNAPSHOT_SHM)),
                Copied("", mounted.upperdir, str(staging / SNAPSHOT_ROOTFS)),
            ]
            remaps = images.link_remaps(staging / SNAPSHOT_CRIU)
            give_links(remaps, lost, copied, source.container)


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


def _precopy(diff: DiffCopy) -> None:
    """Copy what can be copied while the container runs.

    What was written in the last two seconds may be written again unseen, so that it would be
    copied once more in the frozen window: when that is much, it is given time to settle.
    """
    if diff.precopy().unsettled_bytes > _MUCH_BYTES:
        time.sleep(_SETTLE_S)
        diff.precopy()


def _overlay(source: Source) -> overlay.Overlay:
    try:
        return overlay.read_overlay(source.rootfs)
    except (OSError, ValueError) as error:
        raise RootfsNotCopied(
            "cannot find the container's upperdir", container=source.container, why=str(error),
            do="Is the node's snapshotter overlayfs?",
        ) from error  # fmt: skip


def _copy_shm(source: Source, target: Path) -> None:
    if not source.shm:
        return
    dirfd = os.open(source.shm, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        devshm.capture(dirfd, str(target), container=source.container)
    finally:
        os.close(dirfd)


def _checkpoint(source: Source, image_dir: Path, unanswered: str, until: float) -> None:
    """unanswered: a likely cause of a failure, or empty."""
    work = source.private / CONTAINER_WORK
    work.mkdir(mode=0o700, exist_ok=True)
    argv = [
        *source.runtime, f"--log={work}/runc.log", "--log-format=json", "checkpoint",
        "--leave-running", f"--image-path={image_dir}", f"--work-path={work}", source.container,
    ]  # fmt: skip
    why = ""
    try:
        environment = options.write_for_dump(str(source.private / _DUMP_CONF))
        with journal.lock(str(source.private), journal.CHECKPOINT) as lock_fd:
            within_s = max(_SPARE_S, until - time.monotonic())
            ended = tool.run(argv, within_s=within_s, environment=environment, held_fd=lock_fd)
        if ended.status:
            why = "; ".join(filter(None, [first_error(str(work), "dump.log"), unanswered]))
    except (OSError, TimeoutError) as error:
        why = str(error)
    if why:
        raise CriuDumpFailed(
            "cannot dump the process tree", container=source.container, why=why,
            do=f"The whole log is {work}/dump.log while the container exists.",
        )  # fmt: skip
