"""Which containers a pod has at once: what one makes in /dev/shm, another could have made, too.

All containers of all pods count, also of those that did not opt in. The records that are written
here are what a capture tells apart by: see `shim.capture.record`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shim.capture import record

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
    """A container is being created.

    found: what is in its pod now. is_alone: whether no other container is.
    """

    found: record.Record
    is_alone: bool

    def tell(self, container: str) -> None:
        """Write the records of this container, which has its directory now. Never fails."""
        _write(container, record.BEFORE, self.found)
        if not self.is_alone:
            _write(container, record.OTHERS, record.NOTHING_KNOWN)


class Company:
    """The containers of each sandbox, by name. Only the event loop changes it."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._of_sandbox: dict[str, dict[str, str]] = {}

    def arrives(self, container: nri_pb2.Container, *, is_ours: bool) -> Arrival:
        """A container is being created: nobody else in its pod is alone any more.

        An earlier attempt of it that has ended is nobody. is_ours: whether it opted in.
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

    def leaves(self, container: nri_pb2.Container) -> None:
        """A container has ended."""
        here = self._of_sandbox.get(container.pod_sandbox_id, {})
        if here.get(container.name) == container.id:
            del here[container.name]
        if not here:
            self._of_sandbox.pop(container.pod_sandbox_id, None)

    def replace_all(self, containers: Iterable[nri_pb2.Container]) -> None:
        """These exist, and nobody knows who came while the daemon was away."""
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
    """The directory of the node behind the container's /dev/shm, or empty."""
    sources = [each.source for each in container.mounts if each.destination.rstrip("/") == _SHM]
    return sources[-1] if sources and sources[-1].startswith("/") else ""


def _ipc(container: nri_pb2.Container) -> str:
    """The path of the IPC namespace that it joins, or empty."""
    return next((each.path for each in container.linux.namespaces if each.type == "ipc"), "")


def _write(container: str, name: str, found: record.Record) -> None:
    try:
        record.write(container, name, found)
    except OSError as error:
        # Without it nothing is known, and what nobody holds makes its capture fail.
        log.warning("container %s: cannot note what was there before it: %s", container, error)
