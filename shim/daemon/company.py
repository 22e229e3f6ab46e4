"""Records which containers share a pod: any of them could have made a file in its /dev/shm.

All containers of all pods count, also the containers that did not opt in. A capture uses the
records that this module writes: see `shim.source.record`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shim.source import record

if TYPE_CHECKING:
    from collections.abc import Iterable

    from protos import nri_pb2
    from shim.daemon.registry import Registry

log = logging.getLogger(__name__)

_SHM = "/dev/shm"
_STATES = (1, 2, 3)
"""Created, paused, running: numbers of nri_pb2 whose names mypy cannot see."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """The circumstances in which a container is created.

    found: the content of its pod now. is_alone: whether the pod has no other container.
    """

    found: record.PodRecord
    is_alone: bool

    def tell(self, container: str) -> None:
        """Write the records of this container, whose directory exists by now. Never fails."""
        _write(container, record.BEFORE, self.found)
        if not self.is_alone:
            _write(container, record.OTHERS, record.NOTHING_KNOWN)


class Company:
    """Knows the containers of each sandbox by name. Only the event loop changes it."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._of_sandbox: dict[str, dict[str, str]] = {}

    def arrives(self, container: nri_pb2.Container, *, is_ours: bool) -> Arrival:
        """Note a new container: from now on no other container of its pod is alone.

        Does not count an earlier attempt of the container, which has ended. is_ours: whether the
        container opted in.
        """
        here = self._of_sandbox.setdefault(container.pod_sandbox_id, {})
        others = [number for name, number in here.items() if name != container.name]
        here[container.name] = container.id
        found = record.NOTHING_KNOWN
        kept = [each for each in self._registry if each.container in others]
        untold = [each for each in kept if not record.has(each.container, record.OTHERS)]
        if untold or is_ours:
            found = record.take(_shm(container), _ipc(container))
        for each in untold:
            _write(each.container, record.OTHERS, found)
        return Arrival(found, not others)

    def others(self, container: nri_pb2.Container) -> int:
        """How many other containers its pod has now."""
        here = self._of_sandbox.get(container.pod_sandbox_id, {})
        return len(set(here.values()) - {container.id})

    def leaves(self, container: nri_pb2.Container) -> None:
        """Forget a container that has ended."""
        here = self._of_sandbox.get(container.pod_sandbox_id, {})
        if here.get(container.name) == container.id:
            del here[container.name]
        if not here:
            self._of_sandbox.pop(container.pod_sandbox_id, None)

    def replace_all(self, containers: Iterable[nri_pb2.Container]) -> None:
        """Replace the known containers: we cannot know which came while the daemon was down."""
        self._of_sandbox = {}
        for each in containers:
            if each.state in _STATES:
                self._of_sandbox.setdefault(each.pod_sandbox_id, {})[each.name] = each.id
        for tracked in self._registry:
            here = self._of_sandbox.get(tracked.pod.sandbox, {})
            is_alone = set(here.values()) <= {tracked.container}
            if not is_alone and not record.has(tracked.container, record.OTHERS):
                _write(tracked.container, record.OTHERS, record.NOTHING_KNOWN)


def _shm(container: nri_pb2.Container) -> str:
    """Returns the node's directory behind the container's /dev/shm, or empty."""
    sources = [each.source for each in container.mounts if each.destination.rstrip("/") == _SHM]
    return sources[-1] if sources and sources[-1].startswith("/") else ""


def _ipc(container: nri_pb2.Container) -> str:
    """Returns the path of the IPC namespace that the container joins, or empty."""
    return next((each.path for each in container.linux.namespaces if each.type == "ipc"), "")


def _write(container: str, name: str, found: record.PodRecord) -> None:
    try:
        record.write(container, name, found)
    except OSError as error:
        # Without the record nothing is known, and a file that nobody holds fails the capture.
        log.warning(
            "container %s: cannot record the objects that its pod had before: %s", container, error
        )
