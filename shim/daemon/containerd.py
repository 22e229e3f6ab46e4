"""Asks containerd's own API for a container's spec, image digest and log. Read only.

NRI does not report a container's user, working directory or seccomp profile; containerd's record of
the container has the whole OCI spec, adjustments included.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from protos import (
    containerd_containers_pb2,
    containerd_containers_pb2_grpc,
    containerd_images_pb2,
    containerd_images_pb2_grpc,
)
from shim.contract import jsontext
from shim.contract.limits import MAX_SPEC_BYTES
from shim.oci import spec as oci_spec

if TYPE_CHECKING:
    from shim.contract.names import ContainerId
    from shim.oci.spec import Spec

_CONTAINER = "io.cri-containerd.container.metadata"
_SANDBOX = "io.cri-containerd.sandbox.metadata"
_POD_UID, _NAME = "io.kubernetes.pod.uid", "io.kubernetes.container.name"
_KIND = "io.cri-containerd.kind"
_CALL_S = 5.0


class ContainerdRefused(Exception):
    """containerd did not answer a call, or answered with an error, which the message quotes."""


@dataclass(frozen=True, slots=True)
class ContainerRecord:
    """spec: the OCI spec for the runtime. image: the image's name. log_path: may be empty."""

    spec: Spec
    image: str
    image_digest: str
    log_path: str


class Containerd:
    """A connection to containerd: opened by the first call, and again after a restart."""

    def __init__(self, socket: str, namespace: str) -> None:
        self._channel = grpc.aio.insecure_channel(f"unix://{socket}")
        self._metadata = (("containerd-namespace", namespace),)
        self._containers = containerd_containers_pb2_grpc.ContainersStub(self._channel)
        self._images = containerd_images_pb2_grpc.ImagesStub(self._channel)

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close(None)

    async def record(self, container: ContainerId) -> ContainerRecord:
        """Returns containerd's record of a container. Raises ContainerdRefused."""
        found = await self._container(container)
        try:
            image = (
                await self._images.Get(
                    containerd_images_pb2.GetImageRequest(name=found.image),
                    metadata=self._metadata, timeout=_CALL_S,
                )
            ).image  # fmt: skip
        except grpc.RpcError as error:
            raise ContainerdRefused(f"image {found.image}: {error}") from error
        if len(found.spec.value) > MAX_SPEC_BYTES:
            size = len(found.spec.value)
            raise ContainerdRefused(f"its spec has {size} bytes; {MAX_SPEC_BYTES} are read")
        spec, metadata = await asyncio.to_thread(_parsed, found, _CONTAINER)
        log_path = str(metadata.get("LogPath") or "")
        return ContainerRecord(spec, found.image, image.target.digest, log_path)

    async def addresses(self, sandbox: str) -> tuple[str, ...]:
        """Returns the pod's addresses, which NRI reports only from containerd 2.0 on.

        Raises ContainerdRefused.
        """
        record = await self._container(sandbox)
        metadata = await asyncio.to_thread(_metadata, record, _SANDBOX)
        found = [metadata.get("IP"), *(metadata.get("AdditionalIPs") or ())]
        return tuple(str(address) for address in found if address)

    async def later_ones(self, container: ContainerId) -> list[str]:
        """Returns the names of the pod's other containers that were created after this container.

        Includes ended containers until kubelet removes them. Raises ContainerdRefused.
        """
        own = await self._container(container)
        wanted = {_POD_UID: own.labels[_POD_UID], _KIND: "container"}
        filters = [f'labels."{name}"=={jsontext.compose(value)}' for name, value in wanted.items()]
        request = containerd_containers_pb2.ListContainersRequest(filters=[",".join(filters)])
        try:
            answer = await self._containers.List(
                request, metadata=self._metadata, timeout=_CALL_S
            )  # fmt: skip
        except grpc.RpcError as error:
            raise ContainerdRefused(f"the containers of {container}'s pod: {error}") from error
        since = own.created_at.ToNanoseconds()
        return [
            each.labels[_NAME]
            for each in answer.containers
            if each.labels[_NAME] != own.labels[_NAME] and each.created_at.ToNanoseconds() > since
        ]

    async def _container(self, container: str) -> containerd_containers_pb2.Container:
        try:
            answer = await self._containers.Get(
                containerd_containers_pb2.GetContainerRequest(id=container),
                metadata=self._metadata, timeout=_CALL_S,
            )  # fmt: skip
        except grpc.RpcError as error:
            raise ContainerdRefused(f"{container}: {error}") from error
        return answer.container


def _parsed(found: containerd_containers_pb2.Container, name: str) -> tuple[Spec, dict[str, Any]]:
    """Returns the spec and the CRI plugin's record. For a thread: they may be long."""
    return oci_spec.parse(found.spec.value), _metadata(found, name)


def _metadata(found: containerd_containers_pb2.Container, name: str) -> dict[str, Any]:
    """Returns the CRI plugin's record of a container or sandbox, empty when there is none."""
    if name not in found.extensions:
        return {}
    if len(found.extensions[name].value) > MAX_SPEC_BYTES:
        return {}
    record = jsontext.parse(found.extensions[name].value).get("Metadata")
    return record if isinstance(record, dict) else {}
