"""Defines the base class of plugins, and the table of NRI's events.

A plugin overrides the methods of the events that it wants, and subscribes to no others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from protos import nri_pb2

Pod = nri_pb2.PodSandbox
Container = nri_pb2.Container


class Plugin:
    """Handlers of NRI events, all on the event loop that runs `session.serve`.

    containerd and the pod wait for each handler, so a handler works from memory. After its budget,
    the service cancels the handler and answers without a result. So a handler may be cancelled at
    any await, and must start a task for work that has to be finished. The service reports an
    exception of a handler, and answers then, too: no handler can stop a pod. Only
    `create_container` returns an answer.
    """

    async def synchronize(self, pods: Sequence[Pod], containers: Sequence[Container]) -> None:
        """Called after every connect with all that exists: forget everything else."""

    async def run_pod_sandbox(self, pod: Pod) -> None:
        """Called when the sandbox is set up, network included; `pod.ips` needs NRI 0.8."""

    async def stop_pod_sandbox(self, pod: Pod) -> None:
        """Called when the pod's containers are stopped and the sandbox is going down.

        containerd sends this and `remove_pod_sandbox` only for sandboxes that it made itself since
        its last start: a plugin that keeps something per pod must also learn from `synchronize`.
        """

    async def remove_pod_sandbox(self, pod: Pod) -> None:
        """Called while the pod is being removed."""

    async def create_container(
        self, pod: Pod, container: Container
    ) -> nri_pb2.ContainerAdjustment | None:
        """Called with a new spec, which the plugin can still adjust; None leaves it as it is."""

    async def post_create_container(self, pod: Pod, container: Container) -> None:
        """Called when containerd has the container, adjusted, before it calls the OCI runtime."""

    async def start_container(self, pod: Pod, container: Container) -> None:
        """Called before the container starts."""

    async def post_start_container(self, pod: Pod, container: Container) -> None:
        """Called when the container runs."""

    async def update_container(
        self, pod: Pod, container: Container, resources: nri_pb2.LinuxResources
    ) -> None:
        """Called before the container's resources change to `resources`."""

    async def post_update_container(self, pod: Pod, container: Container) -> None:
        """Called after the container's resources have changed."""

    async def stop_container(self, pod: Pod, container: Container) -> None:
        """Called when the container has ended or was stopped."""

    async def remove_container(self, pod: Pod, container: Container) -> None:
        """Called while the container is being removed."""


@dataclass(frozen=True, slots=True)
class Event:
    """A row: an event's number, the plugin's method, and whether the event is about a container."""

    number: int
    method: str
    of_container: bool


EVENTS: Final = MappingProxyType(
    {
        "RunPodSandbox": Event(nri_pb2.RUN_POD_SANDBOX, "run_pod_sandbox", False),
        "StopPodSandbox": Event(nri_pb2.STOP_POD_SANDBOX, "stop_pod_sandbox", False),
        "RemovePodSandbox": Event(nri_pb2.REMOVE_POD_SANDBOX, "remove_pod_sandbox", False),
        "CreateContainer": Event(nri_pb2.CREATE_CONTAINER, "create_container", True),
        "PostCreateContainer": Event(nri_pb2.POST_CREATE_CONTAINER, "post_create_container", True),
        "StartContainer": Event(nri_pb2.START_CONTAINER, "start_container", True),
        "PostStartContainer": Event(nri_pb2.POST_START_CONTAINER, "post_start_container", True),
        "UpdateContainer": Event(nri_pb2.UPDATE_CONTAINER, "update_container", True),
        "PostUpdateContainer": Event(nri_pb2.POST_UPDATE_CONTAINER, "post_update_container", True),
        "StopContainer": Event(nri_pb2.STOP_CONTAINER, "stop_container", True),
        "RemoveContainer": Event(nri_pb2.REMOVE_CONTAINER, "remove_container", True),
    }
)
"""Events by NRI's name, which is also the name of the event's RPC.

Only events that every runtime from NRI 0.6 on knows: for a newer event, older runtimes drop us.
"""

BY_NUMBER: Final = MappingProxyType({event.number: name for name, event in EVENTS.items()})


def mask(plugin: Plugin) -> int:
    """Returns the subscription of `plugin`: a bit for each event whose method it overrides.

    Raises ValueError when no bit is set, which NRI would read as all events.
    """
    bits = 0
    for event in EVENTS.values():
        if getattr(type(plugin), event.method) is not getattr(Plugin, event.method):
            bits |= 1 << (event.number - 1)
    if not bits:
        raise ValueError(f"{type(plugin).__name__} handles no event")
    return bits
