"""Has a function for each step of a swap; `shim.restore.sequence` has their order.

A step registers its undo in `swap.undo` before its change, and leaves its results in the swap for
the steps after it. Foreign errors that need other words than the sequence's become an error of
quickthaw in the step.

The runtime starts as early as possible, and then waits (see `shim.criu.restore`). Modules that the
start does not need are imported at their use: on another core, while the runtime starts.
"""

from __future__ import annotations

import contextlib
import os
import time

from shim.contract import faults, journal
from shim.contract.errors import NetworkNotReady, RootfsNotMountable, SnapshotDoesNotFit
from shim.contract.paths import (
    CONTAINER_CRIU_CONF,
    CONTAINER_IMAGES,
    CONTAINER_JOURNAL,
    CONTAINER_WORK,
    CONTAINERS,
    GPU_PAYLOAD,
    SNAPSHOT_CRIU,
    SNAPSHOT_MEMORY,
    SNAPSHOT_ROOTFS,
    SNAPSHOT_SHM,
    SNAPSHOTS,
    SWAPPED,
)
from shim.criu import options
from shim.criu import restore as runtime_restore
from shim.kernel import mounts, survivors
from shim.kernel.beneath import open_beneath, open_dir, remove_tree
from shim.kernel.fds import OwnedFd
from shim.kernel.replace import take_away
from shim.kernel.steps import Steps
from shim.oci.bundle import Bundle
from shim.restore import turns
from shim.rootfs import overlay

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from shim.contract.manifest import Manifest
    from shim.contract.ticket import Ticket
    from shim.gpu.restoring import Restoring
    from shim.integrity.check import SnapshotCheck
    from shim.kernel.process import Child
    from shim.memory.layout import Layout
    from shim.oci.call import Call
    from shim.restore.memory import PageServer

UNDO_S = 10.0
"""The limit for the undo of a swap. Normally the undo takes a tenth of a second."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Swap:
    """A `create` that a restore answers: the subject of all steps, and their results.

    runtime: the real runtime with its global flags. until: the deadline on `time.monotonic`.
    seconds: of each step that was taken. undo: runs if a step fails. held: released in any case.
    turn: released after the steps that load the node. network: the sandbox's network namespace.
    """

    # Results of steps: an attribute is missing until its step has set it.
    child: Child
    """The started runtime."""
    captured: Manifest
    check: SnapshotCheck
    content: Layout
    """The layout of the memory that the page server fills."""
    descriptors: bytes
    """The image of the standard streams, for which the runtime waits."""
    server: PageServer
    gpus: Restoring

    def __init__(self, call: Call, ticket: Ticket, runtime: Sequence[str], until: float) -> None:
        self.call, self.ticket, self.runtime, self.until = call, ticket, runtime, until
        bundle = Bundle(call.option("--bundle", "-b"))
        self.spec, self.rootfs = bundle.spec, bundle.rootfs
        self.snapshot = f"{SNAPSHOTS}/{ticket.snapshot}"
        self.private = f"{CONTAINERS}/{ticket.container}"
        self.images = f"{self.private}/{CONTAINER_IMAGES}"
        self.work = f"{self.private}/{CONTAINER_WORK}"
        self.seconds = Steps()
        self.undo, self.held = contextlib.ExitStack(), contextlib.ExitStack()
        self.turn = contextlib.ExitStack()
        self.network = OwnedFd(-1)

    @property
    def has_gpus(self) -> bool:
        """Whether CUDA processes were captured. Known after `check_snapshot`."""
        return GPU_PAYLOAD in self.captured.facts

    @property
    def netns(self) -> str:
        """The path of the held network namespace, empty if the sandbox has none."""
        fd = self.network.fileno() if self.spec.namespace("network") else -1
        return f"/proc/self/fd/{fd}" if fd >= 0 else ""

    def note(self, kind: str, subject: object) -> None:
        """Write a change into the container's journal. Raises OSError."""
        journal.note(f"{self.private}/{CONTAINER_JOURNAL}", kind, subject)

    def init(self) -> int:
        """The number of the restored container's first process. Raises OSError, ValueError."""
        with open(self.call.option("--pid-file")) as file:
            return int(file.read())


def take_turn(swap: Swap) -> None:
    """Wait in the restore queue. Raises NoTurn."""
    ticket = swap.ticket
    until = min(swap.until, time.monotonic() + ticket.turn_wait_s)
    swap.turn.enter_context(turns.taken(ticket.turns, until=until, container=ticket.container))


def mount_rootfs(swap: Swap) -> None:
    """Mount the overlay again, with the snapshot's diff. Raises RootfsNotMountable."""
    faults.point("restore.check", swap.ticket.container)
    try:
        before = overlay.describe(swap.rootfs)
        swap.note(journal.ROOTFS, before)
        swap.undo.callback(overlay.remount, before)
        faults.point("restore.rootfs.noted", swap.ticket.container)
        overlay.with_extra_lower(swap.rootfs, f"{swap.snapshot}/{SNAPSHOT_ROOTFS}")
        if swap.spec.root.get("readonly"):
            # A restore by runc 1.1 with CRIU 4.1 leaves the root file system writable.
            mounts.make_read_only(swap.rootfs)
        faults.point("restore.rootfs.mounted", swap.ticket.container)
    except (OSError, ValueError) as error:
        raise RootfsNotMountable(
            "cannot mount the snapshot's diff", about=swap.ticket.container,
            why=str(error), do="Is the node's snapshotter overlayfs?",
        ) from error  # fmt: skip


def start_runtime(swap: Swap) -> None:
    """Start `runc restore`, which waits before it reads an image. Raises OSError."""
    os.makedirs(swap.work, 0o700, exist_ok=True)
    marker = f"{SWAPPED}/{swap.ticket.container}"
    swap.undo.callback(
        take_away, marker
    )  # first: the alarm may ring as soon as the marker is there
    with open(marker, "w"):
        pass
    swap.note(journal.RUNTIME, runtime_restore.state_directory(swap.call))
    swap.child = runtime_restore.start(
        swap.call, swap.runtime, swap.images, swap.work, swap.undo, swap.held
    )


def check_snapshot(swap: Swap) -> None:
    """Read the manifest, compare the spec for runc with it, and begin to hash the files.

    Raises SnapshotDoesNotFit, BadManifest, SnapshotNotWhole.
    """
    from shim.contract import manifest
    from shim.gate.checks import SWAP
    from shim.gate.decide import refusals_of
    from shim.gate.request import request_at_swap
    from shim.integrity.check import SnapshotCheck

    container = swap.ticket.container
    dirfd = swap.held.enter_context(OwnedFd(os.open(swap.snapshot, _DIRECTORY))).fileno()
    captured = swap.captured = manifest.read(dirfd, snapshot=swap.ticket.snapshot)
    if reasons := refusals_of(captured, request_at_swap(swap.spec, container), SWAP):
        error = SnapshotDoesNotFit(
            "the snapshot does not fit the container", about=container,
            why="; ".join(map(str, reasons)), do="Capture a pod with the same spec.",
        )  # fmt: skip
        error.codes = [reason.code for reason in reasons]
        raise error
    check = SnapshotCheck(dirfd, captured, container=container, until=swap.until, defer_memory=True)
    swap.check = check
    swap.held.enter_context(check).begin()


def fill_shm(swap: Swap) -> None:
    """Fill the pod's /dev/shm with the captured files. Raises ShmNotFilled."""
    from shim.shm import fill

    source = f"{swap.snapshot}/{SNAPSHOT_SHM}"
    target = swap.spec.bind_source("/dev/shm")
    if not target or not os.path.isdir(source) or not os.listdir(source):
        return
    container = swap.ticket.container
    put = fill.plan(source, target, container=container)
    swap.note(journal.SHM, {"target": target, "put": put})
    swap.undo.callback(_empty_shm, swap, target, put, placed=False)
    faults.point("restore.shm.noted", container)
    fill.build(source, target, put, container=container)
    swap.note(journal.SHM_PLACED, None)
    swap.undo.callback(_empty_shm, swap, target, put, placed=True)
    faults.point("restore.shm.built", container)
    fill.place(target, put, container=container)
    faults.point("restore.shm.filled", container)


def _empty_shm(swap: Swap, target: str, put: Sequence[str], *, placed: bool) -> None:
    from shim.shm import fill

    fill.undo(target, put, container=swap.ticket.container, placed=placed)
    # From now on a file with such a name is the cold started container's, or a neighbour's.
    swap.note(journal.SHM_UNDONE, None)


def prepare_network(swap: Swap) -> None:
    """Make CRIU's images for the pod's network, and write restored.json. Raises NetworkNotReady."""
    from shim.restore import memory, resume

    swap.content = memory.read_layout(swap.ticket, swap.check.memory, swap.check.unchecked)
    try:
        addresses = _make_images(swap)
    except OSError as error:
        raise NetworkNotReady(
            "cannot look at the pod's network", about=swap.ticket.container,
            why=str(error), do="Is the sandbox still there?",
        ) from error  # fmt: skip
    swap.undo.callback(resume.untell, swap.ticket)
    resume.tell(swap.ticket, swap.captured, swap.spec, addresses)
    faults.point("restore.told", swap.ticket.container)


def _make_images(swap: Swap) -> list[str]:
    """Make the images for CRIU, and `swap.descriptors`. Returns the new pod's addresses."""
    from shim.kernel.netns import loopback_is_up
    from shim.network import readdress
    from shim.network.addresses import global_addresses

    images = swap.check.images | readdress.with_name_of(swap.spec, swap.check.images)
    addresses: list[str] = []
    if path := swap.spec.namespace("network"):
        # The path has the number of a process, which is another's when the sandbox has ended. So
        # all later steps use the descriptor.
        swap.network = OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        addresses = global_addresses(swap.netns)
        faults.point("restore.network.read", swap.ticket.container)
        left = readdress.in_images(images, swap.captured.network, addresses)
        if left or not loopback_is_up(swap.netns):
            from shim.network import plan

            plan.write(swap.ticket.container, swap.network, left, swap.undo)
    swap.descriptors = images.pop(runtime_restore.DESCRIPTORS, b"")
    big, piped = swap.check.big_images, [each.image for each in swap.content.shared]
    readdress.view_of(f"{swap.snapshot}/{SNAPSHOT_CRIU}", swap.images, big, images, piped)
    faults.point("restore.images.viewed", swap.ticket.container)
    return addresses


def serve_memory(swap: Swap) -> None:
    """Start the page server. Raises MemoryNotServed."""
    from shim.restore import memory

    swap.server = memory.start(swap.ticket, swap.check, swap.content, swap.images, swap.work)
    swap.undo.callback(swap.server.end)
    faults.point("restore.memory.served", swap.ticket.container)


def start_gpus(swap: Swap) -> None:
    """Start helpers of the CUDA driver and the loader of device memory, which work beside CRIU."""
    from shim.gpu import payload, restoring

    found = payload.of(swap.captured.facts)
    if found is None:
        raise ValueError("the snapshot has no GPU payload")
    files = {name: each for name, each in swap.check.unchecked.items() if name.startswith("gpu")}
    digests = {name: each.digests for name, each in files.items() if each.digests is not None}
    memory = swap.held.enter_context(
        open_beneath(swap.check.snapshot_dirfd, SNAPSHOT_MEMORY, os.O_RDONLY | os.O_DIRECTORY)
    )
    swap.gpus = swap.held.enter_context(
        restoring.Restoring(
            swap.ticket.container,
            found,
            swap.ticket.gpu_pairs,
            swap.until,
            memory.fileno(),
            digests,
        )
    )


def finish_check(swap: Swap) -> None:
    """Wait until all files that the restore reads are checked, except memory."""
    swap.check.finish()
    faults.point("restore.hashed", swap.ticket.container)


def restore_processes(swap: Swap) -> None:
    """Have the waiting runtime and its CRIU restore the processes. Raises CriuRestoreFailed."""
    from shim.restore import opened

    watch = opened.watched(swap.captured, swap.spec, swap.ticket, swap.held)
    _tell_criu(swap, is_asking=watch is not None)
    runtime_restore.go_on(
        swap.child, swap.call, swap.images, swap.descriptors, swap.undo, until=swap.until
    )
    if watch:
        watch.serve(swap.child.pid, swap.until)
    reason = runtime_restore.finish(swap.child, swap.call, swap.work, until=swap.until)
    if watch:
        watch.judge(is_restored=not reason)
    if reason:
        swap.server.check_cause(reason)
        from shim.restore import failure

        raise failure.of_criu(swap.ticket, swap.captured.facts, swap.work, reason)
    swap.server.wait_until_ready(swap.until)
    _check_cgroups(swap)
    _rescore(swap)
    swap.check.unchanged()
    with open_dir(swap.private) as private:  # they take memory, and CRIU is done
        remove_tree(private.fileno(), CONTAINER_IMAGES)


def _tell_criu(swap: Swap, *, is_asking: bool) -> None:
    """Write CRIU's options, which CRIU reads after the descriptors. Raises OSError."""
    from shim.network import readdress
    from shim.restore import cgroups

    options.write(
        f"{swap.private}/{CONTAINER_CRIU_CONF}",
        is_brief=readdress.has_earlier(swap.check.big_images), is_asking=is_asking,
        sources=cgroups.sources(
            swap.spec, swap.ticket.container,
            is_systemd="--systemd-cgroup" in swap.call.root_flags,
        ),
    )  # fmt: skip


def _check_cgroups(swap: Swap) -> None:
    """Check that the container is in its own cgroups. Raises SwapFailed, OSError."""
    from shim.restore import cgroups

    if swap.call.option("--pid-file"):
        cgroups.check(swap.spec, swap.ticket.container, swap.init())


def _rescore(swap: Swap) -> None:
    """Set the OOM scores. The runtime has written the pid of the container's first process."""
    from shim.restore import oom

    # The process may have ended, and another process may have its number.
    if swap.call.option("--pid-file") and survivors.is_member(
        pid := swap.init(), swap.ticket.container
    ):
        oom.rescore(swap.spec, pid)


def fill_memory(swap: Swap) -> None:
    """Wait until all memory is filled: the driver reads it in order. Raises MemoryNotServed."""
    swap.server.finish(swap.until)


def restore_gpus(swap: Swap) -> None:
    """Have the driver restore all CUDA processes. Raises GpuNotRestored, OSError."""
    swap.gpus.finish(swap.init(), swap.spec, swap.seconds)


def call_workload(swap: Swap) -> None:
    """Make the call that the pod's author asked for. Raises ResumeFailed."""
    from shim.restore import resume

    with swap.server.first_cause():
        resume.call_workload(swap.ticket, swap.netns, swap.runtime, until=swap.until)
    faults.point("restore.resumed", swap.ticket.container)


def keep(swap: Swap) -> None:
    """Make the restore final: the page server goes on without the swap. Raises OSError."""
    swap.server.keep()
    swap.note(journal.DONE, None)
