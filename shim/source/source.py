"""The captured container, and the window in which it is frozen."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shim.contract import journal
from shim.contract.errors import NotCapturable, NotFrozen
from shim.contract.paths import CONTAINERS
from shim.criu import options
from shim.kernel.cgroup import Freezer
from shim.source.guard import guarded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from shim.contract.names import ContainerId
    from shim.kernel.held import Held
    from shim.kernel.steps import Steps
    from shim.oci.spec import Spec
    from shim.source.guard import FreezeGuard

FREEZE_S = 10.0
"""The limit for freezing a container: a task in uninterruptible sleep delays the freeze."""


@dataclass(frozen=True, slots=True)
class Source:
    """A capture's knowledge of a running container.

    runtime: the real runtime with its global flags. spec: the container's config.json. bundle: its
    directory. log_path: the log file as kubelet named it, or empty. held: the first process, held
    since its start; None only if nobody asks for it. gpus: the container's GPUs, as
    `shim.kernel.nvml` lists them; None if they are not known. criu: the node's version of CRIU, as
    CRIU prints it.
    """

    container: ContainerId
    pid: int
    bundle: str
    spec: Spec
    runtime: tuple[str, ...]
    log_path: str
    held: Held | None = None
    gpus: Sequence[Mapping[str, object]] | None = ()
    criu: str = ""

    @property
    def process(self) -> Held:
        """The first process, the same as at the start. Raises NotCapturable."""
        if self.held is None:
            raise NotCapturable(
                "cannot capture", about=self.container, why="its process is not known",
                do="Is the container still running?",
            )  # fmt: skip
        return self.held

    @property
    def private(self) -> Path:
        """The root-only directory of our files about this container."""
        return Path(CONTAINERS) / self.container

    @property
    def rootfs(self) -> str:
        """The mounted root file system, as the host sees it."""
        return str(Path(self.bundle) / self.spec.root["path"])

    @property
    def shm(self) -> str:
        """The host directory behind /dev/shm, or empty if CRIU captures /dev/shm with its tmpfs."""
        return self.spec.bind_source("/dev/shm")

    def check(self) -> None:
        """Raises NotCapturable for a container that no snapshot can hold."""
        why, do = "", "Change the pod, or take its quickthaw.io/snapshot annotation away."
        if not self.private.is_dir():
            why, do = "quickthawd was away when it was created", "Start the pod again."
        elif self.spec.process.get("terminal"):
            why = "it has a terminal"
        elif self.spec.annotation(options.ANNOTATION) != options.path_of(self.container):
            why = f"its spec names another file than ours in {options.ANNOTATION}"
        elif self.shm.rstrip("/") == "/dev/shm":
            why = "its /dev/shm is the host's"
        elif not any(ns.get("type") == "pid" and not ns.get("path") for ns in self.spec.namespaces):
            why = "it has no PID namespace of its own"
        if why:
            raise NotCapturable(
                "cannot capture", about=self.container, why=why, do=do
            )  # fmt: skip


def thaw_left(container: str) -> bool:
    """Thaw a container that a killed daemon left frozen. Returns False during its checkpoint.

    At its end CRIU puts the freezer back into the state that CRIU found: after an earlier thaw, the
    container would stay frozen. Raises OSError.
    """
    private = f"{CONTAINERS}/{container}"
    # A guard that is about to thaw must not thaw in the frozen window of the next capture.
    if any(journal.is_locked(private, name) for name in (journal.CHECKPOINT, journal.THAW)):
        return False
    for kind, subject in journal.changes(journal.path_of(container)):
        if kind == journal.FROZEN and os.path.isdir(str(subject)):
            Freezer(str(subject)).thaw()
    return True


@contextlib.contextmanager
def frozen(source: Source, guard: FreezeGuard, steps: Steps, *, until: float) -> Iterator[Freezer]:
    """Freeze the container, and thaw it again whatever happens. Raises NotFrozen.

    guard: of `guarding`; afterwards it is dismissed. until: when it thaws the container in any
    case, on `time.monotonic`. A killed daemon leaves the guard, and a journal line, with which the
    next daemon thaws. The step `frozen`: from the request to freeze to the end of the freeze.
    """
    with _border(source):
        freezer = own_freezer(source)
        journal.note(journal.path_of(source.container), journal.FROZEN, freezer.path)
        guard.limit(until)
    began = time.monotonic()
    try:
        with _border(source):
            freezer.freeze(until=min(began + FREEZE_S, until))
        yield freezer
    finally:
        with _border(source):
            freezer.thaw()
        steps.add("frozen", began, time.monotonic())
    if guard.dismiss():
        raise NotFrozen(
            "the container did not stay frozen", about=source.container,
            why="the guard thawed it: the frozen window exceeded its limit, or quickthawd "
            f"was stopped; it was left after {steps['frozen']:g} s",
            do="Find the slow part: CRIU, the disk of the store, or the number of files.",
        )  # fmt: skip


@contextlib.contextmanager
def guarding(source: Source, until: float) -> Iterator[FreezeGuard]:
    """Start the guard of a frozen window, before anything stands still: it takes a moment.

    until: as of `frozen`, as long as the window has not begun. Raises NotFrozen.
    """
    with contextlib.ExitStack() as stack:
        with _border(source):
            freezer = own_freezer(source)
            guard = stack.enter_context(guarded(source.container, freezer.path, until))
        yield guard


def own_freezer(source: Source) -> Freezer:
    """Returns the freezer of the container's cgroup. Raises OSError, ValueError.

    The kernel shows an ending process in the root cgroup, and its number may become another's: we
    must not freeze the processes there, and least of all ourselves.
    """
    freezer = Freezer.of(source.pid)
    if source.container not in os.path.basename(freezer.path):
        raise ValueError(f"process {source.pid} is in {freezer.path}: has the container ended?")
    return freezer


@contextlib.contextmanager
def _border(source: Source) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise NotFrozen(
            "cannot freeze or thaw", about=source.container, why=str(error),
            do="Look for processes in uninterruptible sleep.",
        ) from error  # fmt: skip
