"""CRI, typed: a method per call that kubelet makes, records of protobuf in and out."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import grpc

from protos import cri_pb2 as pb
from protos import cri_pb2_grpc as rpc

CALL_WITHIN_S: Final = 120.0
"""kubelet's own limit for a runtime call is two minutes."""
READY_WITHIN_S: Final = 30.0
NOT_YET: Final = (
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNKNOWN,  # containerd 1.7's word for unavailable
)
CHANNEL_OPTIONS: Final = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
)


class Cri:
    """A connection to a CRI runtime's socket. Calls raise grpc.RpcError."""

    def __init__(self, socket: Path) -> None:
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=CHANNEL_OPTIONS)
        self.runtime = rpc.RuntimeServiceStub(self._channel)
        self.images = rpc.ImageServiceStub(self._channel)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def wait_ready(self) -> None:
        """Wait until runtime and network are ready. Raises TimeoutError or grpc.RpcError."""
        deadline = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < deadline:
            try:
                answer = self.runtime.Status(
                    pb.StatusRequest(), timeout=READY_WITHIN_S, wait_for_ready=True
                )
            except grpc.RpcError as error:
                # The socket exists before the plugin behind it, and the plugin before its recovery.
                if error.code() not in NOT_YET:
                    raise
            else:
                if all(condition.status for condition in answer.status.conditions):
                    return
            time.sleep(0.05)  # CRI has no event for this
        raise TimeoutError("containerd's CRI does not get ready")

    def version(self) -> pb.VersionResponse:
        """Call Version; returns name and version of the runtime."""
        return self.runtime.Version(pb.VersionRequest(), timeout=CALL_WITHIN_S)

    def run_pod_sandbox(self, config: pb.PodSandboxConfig, handler: str = "") -> str:
        """Call RunPodSandbox; returns the sandbox's id. handler: the runtime, "" for default."""
        request = pb.RunPodSandboxRequest(config=config, runtime_handler=handler)
        return self.runtime.RunPodSandbox(request, timeout=CALL_WITHIN_S).pod_sandbox_id

    def stop_pod_sandbox(self, pod_id: str) -> None:
        """Call StopPodSandbox: kill the sandbox's processes, take its network down."""
        request = pb.StopPodSandboxRequest(pod_sandbox_id=pod_id)
        self.runtime.StopPodSandbox(request, timeout=CALL_WITHIN_S)

    def remove_pod_sandbox(self, pod_id: str) -> None:
        """Call RemovePodSandbox."""
        request = pb.RemovePodSandboxRequest(pod_sandbox_id=pod_id)
        self.runtime.RemovePodSandbox(request, timeout=CALL_WITHIN_S)

    def pod_sandbox_status(self, pod_id: str) -> pb.PodSandboxStatus:
        """Call PodSandboxStatus."""
        request = pb.PodSandboxStatusRequest(pod_sandbox_id=pod_id)
        return self.runtime.PodSandboxStatus(request, timeout=CALL_WITHIN_S).status

    def pod_sandboxes(self) -> Sequence[pb.PodSandbox]:
        """Call ListPodSandbox."""
        return self.runtime.ListPodSandbox(pb.ListPodSandboxRequest(), timeout=CALL_WITHIN_S).items

    def create_container(
        self, pod_id: str, config: pb.ContainerConfig, sandbox: pb.PodSandboxConfig
    ) -> str:
        """Call CreateContainer; returns the container's id."""
        request = pb.CreateContainerRequest(
            pod_sandbox_id=pod_id, config=config, sandbox_config=sandbox
        )
        return self.runtime.CreateContainer(request, timeout=CALL_WITHIN_S).container_id

    def start_container(self, container_id: str) -> None:
        """Call StartContainer."""
        request = pb.StartContainerRequest(container_id=container_id)
        self.runtime.StartContainer(request, timeout=CALL_WITHIN_S)

    def stop_container(self, container_id: str, grace_s: int) -> None:
        """Call StopContainer: send the stop signal, then SIGKILL after `grace_s`."""
        request = pb.StopContainerRequest(container_id=container_id, timeout=grace_s)
        self.runtime.StopContainer(request, timeout=CALL_WITHIN_S + grace_s)

    def remove_container(self, container_id: str) -> None:
        """Call RemoveContainer."""
        request = pb.RemoveContainerRequest(container_id=container_id)
        self.runtime.RemoveContainer(request, timeout=CALL_WITHIN_S)

    def containers(self, pod_id: str = "") -> Sequence[pb.Container]:
        """Call ListContainers, for a single pod or for all."""
        wanted = pb.ContainerFilter(pod_sandbox_id=pod_id)
        request = pb.ListContainersRequest(filter=wanted)
        return self.runtime.ListContainers(request, timeout=CALL_WITHIN_S).containers

    def container_status(self, container_id: str) -> pb.ContainerStatus:
        """Call ContainerStatus."""
        request = pb.ContainerStatusRequest(container_id=container_id)
        return self.runtime.ContainerStatus(request, timeout=CALL_WITHIN_S).status

    def container_info(self, container_id: str) -> dict[str, Any]:
        """Returns the additions of a verbose ContainerStatus: `pid`, `runtimeSpec`, `snapshotKey`
        and more.
        """
        request = pb.ContainerStatusRequest(container_id=container_id, verbose=True)
        answer = self.runtime.ContainerStatus(request, timeout=CALL_WITHIN_S)
        info: dict[str, Any] = json.loads(answer.info["info"])
        return info

    def container_stats(self, container_id: str) -> pb.ContainerStats:
        """Call ContainerStats."""
        request = pb.ContainerStatsRequest(container_id=container_id)
        return self.runtime.ContainerStats(request, timeout=CALL_WITHIN_S).stats

    def all_container_stats(self) -> Sequence[pb.ContainerStats]:
        """Call ListContainerStats."""
        request = pb.ListContainerStatsRequest()
        return self.runtime.ListContainerStats(request, timeout=CALL_WITHIN_S).stats

    def exec_sync(
        self, container_id: str, command: Sequence[str], timeout_s: int
    ) -> pb.ExecSyncResponse:
        """Call ExecSync."""
        request = pb.ExecSyncRequest(container_id=container_id, cmd=command, timeout=timeout_s)
        return self.runtime.ExecSync(request, timeout=CALL_WITHIN_S)

    def exec_url(self, container_id: str, command: Sequence[str], *, stdin: bool) -> str:
        """Call Exec without a terminal; returns the URL of the streams."""
        request = pb.ExecRequest(
            container_id=container_id, cmd=command, stdin=stdin, stdout=True, stderr=True
        )
        return self.runtime.Exec(request, timeout=CALL_WITHIN_S).url

    def attach_url(self, container_id: str, *, stdin: bool, tty: bool) -> str:
        """Call Attach; returns the URL of the streams of the container's own process."""
        request = pb.AttachRequest(
            container_id=container_id, stdin=stdin, stdout=True, stderr=not tty, tty=tty
        )
        return self.runtime.Attach(request, timeout=CALL_WITHIN_S).url

    def reopen_container_log(self, container_id: str) -> None:
        """Call ReopenContainerLog, as kubelet does after a rotation."""
        request = pb.ReopenContainerLogRequest(container_id=container_id)
        self.runtime.ReopenContainerLog(request, timeout=CALL_WITHIN_S)

    @contextmanager
    def events(self) -> "Iterator[grpc.CallIterator[pb.ContainerEventResponse]]":
        """Call GetContainerEvents; yields the events inside of the `with`."""
        events = self.runtime.GetContainerEvents(pb.GetEventsRequest())
        try:
            yield events
        finally:
            events.cancel()  # type: ignore[no-untyped-call]  # the stubs forget its annotations

    def image_names(self) -> set[str]:
        """Call ListImages; returns all tags."""
        answer = self.images.ListImages(pb.ListImagesRequest(), timeout=CALL_WITHIN_S)
        return {tag for image in answer.images for tag in image.repo_tags}

    def image_status(self, name: str) -> pb.Image | None:
        """Call ImageStatus; returns None when there is no such image."""
        request = pb.ImageStatusRequest(image=pb.ImageSpec(image=name))
        answer = self.images.ImageStatus(request, timeout=CALL_WITHIN_S)
        return answer.image if answer.HasField("image") else None
