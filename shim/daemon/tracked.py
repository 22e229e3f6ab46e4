"""A container that opted in: its pod, its wish, the properties that match it, and its state."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from shim.gate import gpu
from shim.gpu import payload
from shim.kernel.held import Held
from shim.report.records import Subject

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping, Sequence

    from shim.contract.manifest import Manifest
    from shim.contract.names import ContainerId
    from shim.gate.gpu import Gpu
    from shim.gate.request import Request
    from shim.workload.annotations import Wish

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

    def subject(self, container: str, container_id: str = "") -> Subject:
        """Returns a container of the pod as reports name it. container: its name."""
        return Subject(self.namespace, self.name, self.uid, container, container_id)


@dataclass(frozen=True, slots=True)
class Identity:
    """The properties by which a container is matched."""

    request: Request
    image: str
    image_digest: str
    log_path: str
    command: tuple[str, ...]
    gpus: Sequence[Gpu] = ()

    @property
    def key(self) -> str:
        """Returns the match key."""
        return self.request.key

    @property
    def facts(self) -> Mapping[str, str]:
        """Returns fact name to canonical JSON, for the manifest of the container's capture."""
        return self.request.facts

    def gpu_pairs(self, found: Manifest) -> list[list[str]]:
        """Which GPU takes the place of which; none for a snapshot without any in use."""
        wanted = payload.of(found.facts)
        return gpu.pairs(wanted.gpus, self.gpus) or [] if wanted else []


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

    @property
    def subject(self) -> Subject:
        """The container as reports name it."""
        return self.pod.subject(self.name, self.container)

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
