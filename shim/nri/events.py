"""What a plugin can handle: the base class to derive from, and the table of NRI's events.

A plugin overrides the methods of the events that it wants; it is subscribed to those and no others.
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

    containerd waits for each of them, and the pod with it: a handler works from memory. It has a
    budget; past that it is cancelled and answered for, so it may be cancelled at any await and must
    hand what has to be finished to a task of its own. Whatever a handler raises is reported and
    answered for too: no handler can stop a pod. All but `create_container` answer nothing.
    """

    async def synchronize(self, pods: Sequence[Pod], containers: Sequence[Container]) -> None:
        """All that exists now. Comes after every connect: forget what is not in it."""

    async def run_pod_sandbox(self, pod: Pod) -> None:
        """The sandbox is set up, network included; `pod.ips` is known from NRI 0.8 on."""

    async def stop_pod_sandbox(self, pod: Pod) -> None:
        """The containers of the pod are stopped and the sandbox is going down.

        containerd sends this and `remove_pod_sandbox` only for sandboxes that it made itself since
        its last start: a plugin that keeps something per pod must also learn from `synchronize`.
        """

    async def remove_pod_sandbox(self, pod: Pod) -> None:
        """The pod is being removed."""

    async def create_container(
        self, pod: Pod, container: Container
    ) -> nri_pb2.ContainerAdjustment | None:
        """The container's spec is made and can still be adjusted; None leaves it as it is."""

    async def post_create_container(self, pod: Pod, container: Container) -> None:
        """The container exists in containerd, as adjusted; the OCI runtime was not called yet."""

    async def start_container(self, pod: Pod, container: Container) -> None:
        """The container is about to be started."""

    async def post_start_container(self, pod: Pod, container: Container) -> None:
        """The container runs."""

    async def update_container(
        self, pod: Pod, container: Container, resources: nri_pb2.LinuxResources
    ) -> None:
        """The container's resources are about to be changed to `resources`."""

    async def post_update_container(self, pod: Pod, container: Container) -> None:
        """The container's resources were changed."""

    async def stop_container(self, pod: Pod, container: Container) -> None:
        """The container has ended or was stopped."""

    async def remove_container(self, pod: Pod, container: Container) -> None:
        """The container is being removed."""


@dataclass(frozen=True, slots=True)
class Event:
    """One row: an event's number, the plugin's method, and whether it is about a container."""

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
"""By the name that NRI gives the event, which is also the name of its RPC.

Only events that every runtime from NRI 0.6 on knows: one more, and the older ones drop the plugin.
"""

BY_NUMBER: Final = MappingProxyType({event.number: name for name, event in EVENTS.items()})


def mask(plugin: Plugin) -> int:
    """The subscription of `plugin`: a bit for each event whose method it overrides.

    Raises ValueError when that is none, which NRI would read as all.
    """
    bits = 0
    for event in EVENTS.values():
        if getattr(type(plugin), event.method) is not getattr(Plugin, event.method):
            bits |= 1 << (event.number - 1)
    if not bits:
        raise ValueError(f"{type(plugin).__name__} handles no event")
    return bits
