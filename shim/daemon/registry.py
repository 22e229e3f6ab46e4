"""Holds the containers that opted in and exist, with the decision and the outcome for each."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from shim.contract import outcome
from shim.contract.paths import CONTAINERS, CONTROL, OUTCOMES, SWAPPED, TICKETS
from shim.kernel.held import Held
from shim.restore.forget import forget

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable, Iterator

    from shim.contract.names import ContainerId
    from shim.daemon.decision import Identity
    from shim.nri.annotations import Wish

log = logging.getLogger(__name__)


_REASON_CHARS = 4096
"""Length of the reason for a state: a single answer has all containers."""


class State(StrEnum):
    """The state of a container, as `quickthaw status` shows it."""

    CREATED = "created"
    RESTORING = "restoring"
    RESTORED = "restored"
    COLD = "cold"
    WAITING = "waiting until ready"
    CAPTURING = "capturing"
    CAPTURED = "captured"
    CAPTURE_FAILED = "capture failed"


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod as NRI names it. sandbox: its id. addresses: if the runtime reports them."""

    namespace: str
    name: str
    uid: str
    sandbox: str
    addresses: tuple[str, ...] = ()


@dataclass(slots=True)
class Tracked:
    """A tracked container. Only the event loop changes it.

    reason: why the container is in this state, for people. identity: the properties for matching,
    once containerd has answered with the spec. pid: of the container's init as the host sees it, 0
    before init runs. held: that process while it runs: later its pid may be another process's.
    others: how many other containers the pod had when this one was created; 1 before the daemon
    knows it.
    """

    container: ContainerId
    name: str
    pod: Pod
    wish: Wish
    restarts: int = 0
    others: int = 1
    pid: int = 0
    held: Held | None = None
    state: State = State.CREATED
    reason: str = ""
    snapshot: str = ""
    identity: Identity | None = None
    since: float = field(default_factory=time.monotonic)
    task: asyncio.Task[Any] | None = None

    def runs(self, pid: int) -> None:
        """Note the container's process. Does not hold a process that has ended meanwhile."""
        self.let_go()
        self.pid = pid
        try:
            self.held = Held(pid, self.container)
        except OSError as error:
            log.info("container %s is not held: %s", self.container, error)

    def let_go(self) -> None:
        """Release the process: the container has ended."""
        held, self.held = self.held, None
        if held:
            held.close()

    def become(self, state: State, reason: str = "") -> None:
        """Change the state. reason: for people."""
        self.state, self.reason, self.since = state, reason[:_REASON_CHARS], time.monotonic()


class Registry:
    """All tracked containers by id. Also removes files that belong to no tracked container."""

    def __init__(self) -> None:
        self._tracked: dict[str, Tracked] = {}

    def __iter__(self) -> Iterator[Tracked]:
        return iter(list(self._tracked.values()))

    def add(self, tracked: Tracked) -> None:
        """Track a container."""
        self._tracked[tracked.container] = tracked

    def get(self, container: str) -> Tracked | None:
        """Returns the tracked container with this id, or None."""
        return self._tracked.get(container)

    def remove(self, container: str) -> Tracked | None:
        """Forget the container. Returns its record, or None."""
        removed = self._tracked.pop(container, None)
        if removed:
            removed.let_go()
        return removed

    def replace_all(self, found: Iterable[Tracked]) -> dict[str, Tracked]:
        """Keep the records of `found`, add new containers, drop the rest. Returns all by id."""
        before = self._tracked
        self._tracked = {
            tracked.container: before.get(tracked.container, tracked) for tracked in found
        }
        for container in before.keys() - self._tracked.keys():
            before[container].let_go()
        return self._tracked

    def sweep(self) -> list[dict[str, object]]:
        """Remove the remains of other containers that an earlier daemon, or a killed swap, left.

        Returns the outcomes of containers that were created and removed while the daemon was down.
        """
        left = {
            name for directory in (CONTAINERS, CONTROL, SWAPPED) for name in os.listdir(directory)
        }
        for name in os.listdir(TICKETS):
            if name.endswith(".json"):
                left.add(name.removesuffix(".json"))
            else:
                os.unlink(f"{TICKETS}/{name}")  # its writer was killed
        for container in sorted(left - self._tracked.keys()):
            try:
                forget(container)
            except (OSError, ValueError) as error:
                log.error("cannot take away what is left of container %s: %s", container, error)
        missed = []
        for name in os.listdir(OUTCOMES):
            if name.removesuffix(".json") not in self._tracked:
                if found := _last_words(name):
                    missed.append(found)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{OUTCOMES}/{name}")
        return sorted(missed, key=lambda found: str(found.get("at")))


def _last_words(name: str) -> dict[str, object] | None:
    try:
        return outcome.take(name.removesuffix(".json"))
    except (OSError, ValueError):
        return None  # half written: its writer was killed
