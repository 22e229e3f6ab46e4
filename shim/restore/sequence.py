"""Runs the steps of a swap in order, under a single deadline. All of them, or none.

Every step registers its undo before its change; leaving `run` with an exception runs the undos in
reverse. After that nothing of the swap is left and the plain `create` may follow.

The runtime starts as early as possible, and then waits (see `shim.criu.restore`). Modules that the
start does not need are imported at their use: on another core, while the runtime starts.
"""

from __future__ import annotations

import contextlib
import os
import time

from shim.contract import faults, journal, jsontext
from shim.contract.errors import (
    NetworkNotReady,
    QuickthawError,
    RootfsNotMountable,
    SnapshotDoesNotFit,
    SwapFailed,
)
from shim.contract.paths import (
    CONTAINER_CRIU_CONF,
    CONTAINER_IMAGES,
    CONTAINER_NETWORK_PLAN,
    CONTAINER_WORK,
    CONTAINERS,
    GPU_PAYLOAD,
    HOOK,
    SNAPSHOT_CRIU,
    SNAPSHOT_MEMORY,
    SNAPSHOT_ROOTFS,
    SNAPSHOT_SHM,
    SNAPSHOTS,
    SWAPPED,
)
from shim.criu import options
from shim.criu import restore as runtime_restore
from shim.kernel import alarm, mounts, process, survivors
from shim.kernel.alarm import TooLate
from shim.kernel.beneath import open_beneath, open_dir, remove_tree
from shim.kernel.fds import OwnedFd
from shim.kernel.replace import take_away
from shim.kernel.steps import Steps
from shim.oci.bundle import Bundle
from shim.restore import turns
from shim.rootfs import overlay

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shim.contract.errors import SwapTooLate
    from shim.contract.manifest import Manifest
    from shim.contract.ticket import Ticket
    from shim.gpu.restoring import Restoring
    from shim.integrity.check import Check
    from shim.kernel.process import Child
    from shim.memory.layout import Layout
    from shim.oci.call import Call
    from shim.restore.memory import PageServer
    from shim.restore.opened import Watch

UNDO_S = 10.0
"""The limit for the undo of a swap. Normally the undo takes a tenth of a second."""


class Swap:
    """A `create` that a restore answers.

    runtime: the real runtime with its global flags. until: the deadline on `time.monotonic`. steps:
    the seconds of each step, filled during the run.
    """

    def __init__(self, call: Call, ticket: Ticket, runtime: Sequence[str], until: float) -> None:
        self.call, self.ticket, self.runtime, self.until = call, ticket, runtime, until
        self.bundle = Bundle(call.option("--bundle", "-b"))
        self.snapshot = f"{SNAPSHOTS}/{ticket.snapshot}"
        self.private = f"{CONTAINERS}/{ticket.container}"
        self.journal = journal.path_of(ticket.container)
        self.images = f"{self.private}/{CONTAINER_IMAGES}"
        self.work = f"{self.private}/{CONTAINER_WORK}"
        self.steps = Steps()
        self._network = OwnedFd(-1)

    def run(self) -> None:
        """Leave the container running, restored. Raises SwapFailed after undoing everything."""
        try:
            with contextlib.ExitStack() as undo:
                undo.enter_context(journal.lock(self.private))
                undo.callback(faults.point, "restore.undone", self.ticket.container)
                try:
                    with (
                        contextlib.ExitStack() as held,
                        self._told(""),
                        alarm.raising(self.until),
                    ):
                        self._take_steps(undo, held)
                except BaseException:
                    alarm.kill_us_after(UNDO_S)  # a sweep removes the rest, as after kill -9
                    faults.point("restore.undo", self.ticket.container)
                    raise
                undo.pop_all()
        finally:
            self._network.close()
            alarm.cancel()

    def _take_steps(self, undo: contextlib.ExitStack, held: contextlib.ExitStack) -> None:
        """Take all steps. undo: runs if a step fails. held: released in any case."""
        with contextlib.ExitStack() as turn:
            with self._step("turn"):
                until = min(self.until, time.monotonic() + self.ticket.turn_wait_s)
                turn.enter_context(
                    turns.taken(self.ticket.turns, until=until, container=self.ticket.container)
                )
            with self._at_most(self.ticket.turn_hold_s):
                server = self._restore_all(undo, held)
        # From here on the workload loads the node no more than any other start does.
        with self._step("resume"):
            from shim.restore import resume

            resume.call_workload(self.ticket, self._netns, self.runtime, until=self.until)
            faults.point("restore.resumed", self.ticket.container)
        server.keep()
        journal.note(self.journal, journal.DONE, None)

    def _restore_all(
        self, undo: contextlib.ExitStack, held: contextlib.ExitStack
    ) -> PageServer:  # fmt: skip
        with self._step("rootfs"):
            faults.point("restore.check", self.ticket.container)
            self._mount_rootfs(undo)
        with self._step("runtime"):
            runtime = self._start_runtime(undo, held)
        with self._step("check"):
            captured, check = self._checked(held)
        with self._step("shm"):
            self._fill_shm(undo)
        with self._step("network"):
            from shim.restore import memory, resume

            content = memory.read_layout(self.ticket, check.memory, check.unchecked)
            addresses, descriptors = self._images(captured, check, content, undo)
            undo.callback(resume.untell, self.ticket)
            resume.tell(self.ticket, captured, self.bundle, addresses)
            faults.point("restore.told", self.ticket.container)
        with self._step("memory"):
            server = self._serve_memory(check, content, undo)
        gpus = self._gpus(captured, check, held) if GPU_PAYLOAD in captured.facts else None
        with self._step("hash"):
            check.finish()
            faults.point("restore.hashed", self.ticket.container)
        with self._step("criu"):
            from shim.restore import opened

            watch = opened.watched(captured, self.bundle.spec, self.ticket, held)
            self._tell_criu(check, is_asking=watch is not None)
            self._restore(captured, runtime, descriptors, server, watch, undo)
            server.wait_until_ready(self.until)
            self._check_cgroups()
            self._rescore()
            check.unchanged()
            with open_dir(self.private) as private:  # they take memory, and CRIU is done
                remove_tree(private.fileno(), os.path.basename(self.images))
        if gpus:
            with self._step("gpu_fill"):
                server.finish(self.until)
            with self._step("gpu"):
                gpus.finish(self._init(), self.bundle.spec, self.steps)
        return server

    def _gpus(self, captured: Manifest, check: Check, held: contextlib.ExitStack) -> Restoring:
        """Helpers of the CUDA driver and the loader of device memory, which work beside CRIU."""
        from shim.gpu import payload, restoring

        found = payload.of(captured.facts)
        if found is None:
            raise ValueError("the snapshot has no GPU payload")
        files = {name: each for name, each in check.unchecked.items() if name.startswith("gpu")}
        digests = {name: each.digests for name, each in files.items() if each.digests is not None}
        memory = held.enter_context(
            open_beneath(check.snapshot_dirfd, SNAPSHOT_MEMORY, os.O_RDONLY | os.O_DIRECTORY)
        )
        return held.enter_context(
            restoring.Restoring(
                self.ticket.container,
                found,
                self.ticket.gpu_pairs,
                self.until,
                memory.fileno(),
                digests,
            )
        )

    @contextlib.contextmanager
    def _at_most(self, seconds: float) -> Iterator[None]:
        """Bound the time of a turn: others wait for it, so no deadline extends it."""
        last = self.until
        self.until = min(last, time.monotonic() + seconds)
        try:
            with alarm.sooner(self.until, last):
                yield
        finally:
            self.until = last

    @contextlib.contextmanager
    def _step(self, name: str) -> Iterator[None]:
        """Time the step, and notice a deadline that passed silently in the step."""
        with self.steps.timed(name), self._told(name):
            yield
        if time.monotonic() > self.until:
            raise self._late(name, "it took too long")

    @contextlib.contextmanager
    def _told(self, step: str) -> Iterator[None]:
        """Give every raised error the container's id and an effect. step: empty between two."""
        try:
            yield
        except QuickthawError:
            raise
        except TooLate as error:
            raise self._late(step, str(error)) from error
        except Exception as error:
            where = f"in step {step}" if step else "between two steps"
            raise SwapFailed(
                f"the swap failed {where}", container=self.ticket.container,
                why=f"{type(error).__name__}: {error}",
                do=f"See `quickthaw show {self.ticket.snapshot[:12]}`.",
            ) from error  # fmt: skip

    def _late(self, step: str, why: str) -> SwapTooLate:
        from shim.restore import failure

        return failure.too_late(self.ticket, self.bundle.spec, step, why)

    def _checked(self, held: contextlib.ExitStack) -> tuple[Manifest, Check]:
        """Returns the manifest of a snapshot that fits the spec for runc, and its running check."""
        from shim.contract import manifest
        from shim.gate.checks import SWAP
        from shim.gate.decide import refusals_of
        from shim.gate.request import request_at_swap
        from shim.integrity.check import Check

        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        container = self.ticket.container
        dirfd = held.enter_context(OwnedFd(os.open(self.snapshot, flags))).fileno()
        captured = manifest.read(dirfd, snapshot=self.ticket.snapshot)
        request = request_at_swap(self.bundle.spec, container)
        if reasons := refusals_of(captured, request, SWAP):
            error = SnapshotDoesNotFit(
                "the snapshot does not fit the container", container=container,
                why="; ".join(map(str, reasons)), do="Capture a pod with the same spec.",
            )  # fmt: skip
            error.codes = [reason.code for reason in reasons]
            raise error
        check = Check(
            dirfd, captured, container=container, until=self.until, defer_memory=True
        )  # fmt: skip
        held.enter_context(check).begin()
        return captured, check

    def _mount_rootfs(self, undo: contextlib.ExitStack) -> None:
        try:
            before = overlay.describe(self.bundle.rootfs)
            journal.note(self.journal, journal.ROOTFS, before)
            undo.callback(overlay.remount, before)
            faults.point("restore.rootfs.noted", self.ticket.container)
            overlay.with_extra_lower(self.bundle.rootfs, f"{self.snapshot}/{SNAPSHOT_ROOTFS}")
            if self.bundle.spec["root"].get("readonly"):
                # A restore by runc 1.1 with CRIU 4.1 leaves the root file system writable.
                mounts.make_read_only(self.bundle.rootfs)
            faults.point("restore.rootfs.mounted", self.ticket.container)
        except (OSError, ValueError) as error:
            raise RootfsNotMountable(
                "cannot mount the snapshot's diff", container=self.ticket.container,
                why=str(error), do="Is the node's snapshotter overlayfs?",
            ) from error  # fmt: skip

    def _fill_shm(self, undo: contextlib.ExitStack) -> None:
        from shim.shm import fill

        source = f"{self.snapshot}/{SNAPSHOT_SHM}"
        target = self.bundle.mount_source("/dev/shm")
        if not target or not os.path.isdir(source) or not os.listdir(source):
            return
        container = self.ticket.container
        put = fill.plan(source, target, container=container)
        journal.note(self.journal, journal.SHM, {"target": target, "put": put})
        undo.callback(self._empty_shm, target, put, placed=False)
        faults.point("restore.shm.noted", container)
        fill.build(source, target, put, container=container)
        journal.note(self.journal, journal.SHM_PLACED, None)
        undo.callback(self._empty_shm, target, put, placed=True)
        faults.point("restore.shm.built", container)
        fill.place(target, put, container=container)
        faults.point("restore.shm.filled", container)

    def _empty_shm(self, target: str, put: Sequence[str], *, placed: bool) -> None:
        from shim.shm import fill

        fill.undo(target, put, container=self.ticket.container, placed=placed)
        # From now on a file with such a name is the cold started container's, or a neighbour's.
        journal.note(self.journal, journal.SHM_UNDONE, None)

    def _images(
        self, captured: Manifest, check: Check, content: Layout, undo: contextlib.ExitStack
    ) -> tuple[list[str], bytes]:
        """Make the images for CRIU. Returns the new pod's addresses, and the descriptors image."""
        from shim.network import readdress
        from shim.network.addresses import global_addresses

        own = f"{self.snapshot}/{SNAPSHOT_CRIU}"
        try:
            written = check.images | readdress.with_name_of(self.bundle, check.images)
            addresses: list[str] = []
            if netns := self._hold_network():
                addresses = global_addresses(netns)
                faults.point("restore.network.read", self.ticket.container)
                patches = readdress.patches_of(captured.network)
                chosen = readdress.replacements([address for address, _ in patches], addresses)
                if patches:
                    files = readdress.readdressed(written[readdress.PATCHED], patches, chosen)
                    written[readdress.PATCHED] = files
                left = {address for address, _ in patches} - chosen.keys()
                self._plan_network(netns, sorted(left), undo)
            descriptors = written.pop(runtime_restore.DESCRIPTORS, b"")
            piped = [each.image for each in content.shared]
            readdress.view_of(own, self.images, check.big_images, written, piped)
            faults.point("restore.images.viewed", self.ticket.container)
            return addresses, descriptors
        except OSError as error:
            raise NetworkNotReady(
                "cannot look at the pod's network", container=self.ticket.container,
                why=str(error), do="Is the sandbox still there?",
            ) from error  # fmt: skip

    def _hold_network(self) -> str:
        """Open the sandbox's network namespace; empty if it has none. Raises OSError.

        The path of the namespace has the number of a process, which is another's when the sandbox
        has ended. So all later steps use the descriptor.
        """
        if path := self.bundle.network_namespace:
            self._network = OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        return self._netns

    @property
    def _netns(self) -> str:
        fd = self._network.fileno() if self.bundle.network_namespace else -1
        return f"/proc/self/fd/{fd}" if fd >= 0 else ""

    def _plan_network(self, netns: str, left: list[str], undo: contextlib.ExitStack) -> None:
        """Write the hook's plan: bring up `lo`, make the addresses in `left` bindable."""
        from shim.kernel.netns import identity, loopback_is_up

        if loopback_is_up(netns) and not left:
            return
        plan = f"{self.private}/{CONTAINER_NETWORK_PLAN}"
        undo.callback(take_away, plan)  # a cold start runs the hook, too, and needs none of it
        if left:
            undo.callback(self._take_addresses_back, netns)
        with open(plan, "w") as file:
            file.write(jsontext.compose({"bindable": left, "netns": identity(netns)}))

    def _take_addresses_back(self, netns: str) -> None:
        """Undo the hook's changes to `lo`. The runtime's poststop hook keeps off while we go on."""
        argv = [HOOK, "undo", self.ticket.container, netns]
        with contextlib.suppress(TooLate):  # the hook at the container's end tries again
            process.run(
                argv, until=time.monotonic() + UNDO_S / 2, quiet=True,
                first=lambda: os.set_inheritable(self._network.fileno(), True),
            )  # fmt: skip

    def _serve_memory(
        self, check: Check, content: Layout, undo: contextlib.ExitStack
    ) -> PageServer:  # fmt: skip
        from shim.restore import memory

        server = memory.start(self.ticket, check, content, self.images, self.work)
        undo.callback(server.end)
        faults.point("restore.memory.served", self.ticket.container)
        return server

    def _start_runtime(self, undo: contextlib.ExitStack, held: contextlib.ExitStack) -> Child:
        os.makedirs(self.work, 0o700, exist_ok=True)
        marker = f"{SWAPPED}/{self.ticket.container}"
        undo.callback(take_away, marker)  # first: the alarm may ring as soon as the marker is there
        with open(marker, "w"):
            pass
        state = runtime_restore.state_directory(self.call)
        journal.note(self.journal, journal.RUNTIME, state)
        return runtime_restore.start(
            self.call, self.runtime, self.images, self.work, undo, held
        )  # fmt: skip

    def _tell_criu(self, check: Check, *, is_asking: bool) -> None:
        """Write CRIU's options, which CRIU reads after the descriptors. Raises OSError."""
        from shim.network import readdress
        from shim.restore import cgroups

        options.write(
            f"{self.private}/{CONTAINER_CRIU_CONF}",
            is_brief=readdress.has_earlier(check.big_images), is_asking=is_asking,
            sources=cgroups.sources(
                self.bundle.spec, self.ticket.container,
                is_systemd="--systemd-cgroup" in self.call.root_flags,
            ),
        )  # fmt: skip

    def _check_cgroups(self) -> None:
        """Check that the container is in its own cgroups. Raises SwapFailed, OSError."""
        from shim.restore import cgroups

        if self.call.option("--pid-file"):
            cgroups.check(self.bundle.spec, self.ticket.container, self._init())

    def _restore(
        self, captured: Manifest, runtime: Child, descriptors: bytes, server: PageServer,
        watch: Watch | None, undo: contextlib.ExitStack,
    ) -> None:  # fmt: skip
        runtime_restore.go_on(runtime, self.call, self.images, descriptors, undo, until=self.until)
        if watch:
            watch.serve(runtime.pid, self.until)
        reason = runtime_restore.finish(runtime, self.call, self.work, until=self.until)
        if watch:
            watch.judge(is_restored=not reason)
        if reason:
            server.check_alive()
            from shim.restore import failure

            raise failure.of_criu(self.ticket, captured.facts, self.work, reason)

    def _rescore(self) -> None:
        """Set the OOM scores. The runtime has written the pid of the container's first process."""
        from shim.restore import oom

        # The process may have ended, and another process may have its number.
        if self.call.option("--pid-file") and survivors.is_member(
            pid := self._init(), self.ticket.container
        ):
            oom.rescore(self.bundle.spec, pid)

    def _init(self) -> int:
        """The number of the restored container's first process. Raises OSError, ValueError."""
        with open(self.call.option("--pid-file")) as file:
            return int(file.read())
