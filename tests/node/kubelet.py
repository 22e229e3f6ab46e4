"""kubelet's part: pods through CRI in kubelet's order, with the files it keeps for them.

Restarts and removals happen when the test says so; there is no loop that reacts.
"""

import datetime
import secrets
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import grpc

from protos import cri_pb2 as pb
from tests.node import cgroups, logs, podspec
from tests.node.podspec import ConfigMap, ContainerSpec, EmptyDir, HostPath, PodSpec, Volume
from tests.node.streaming import Stream

if TYPE_CHECKING:
    from tests.node.node import Node

STOPS_AT_MOST: Final = 20
STOPS_EVERY_S: Final = 0.2
SHIM_ENDED: Final = "ttrpc: closed"
"""containerd 1.7 answers so when it asks a shim that is just ending, as its container has ended."""
LOOK_EVERY_S: Final = 0.02
"""How often state is asked for while something is waited for. CRI's status calls cost 1 ms."""


class Kubelet:
    """The pods of a node."""

    def __init__(self, node: "Node") -> None:
        self.node = node
        self.pods: list[Pod] = []

    def started(self) -> None:
        """Do kubelet's work once containerd answers: make its cgroups, the node's pod network."""
        for quality in ("besteffort", "burstable"):
            self.make_cgroup(f"/kubepods/{quality}")
        network = pb.NetworkConfig(pod_cidr="10.88.0.0/16,fd00:88::/64")
        request = pb.UpdateRuntimeConfigRequest(
            runtime_config=pb.RuntimeConfig(network_config=network)
        )
        self.node.cri.runtime.UpdateRuntimeConfig(request, timeout=10)

    def run_pod(self, name: str, containers: Sequence[ContainerSpec], **rest: Any) -> "Pod":
        """Run a pod and start the containers of the pod. `rest` are fields of PodSpec."""
        pod = self.make_pod(name, containers, **rest)
        pod.run_sandbox()
        for container in pod.containers.values():
            container.create()
            container.start()
        return pod

    def make_pod(self, name: str, containers: Sequence[ContainerSpec], **rest: Any) -> "Pod":
        """Returns a pod for which nothing was done yet: see Pod.run_sandbox and
        Container.create.
        """
        pod = Pod(self, PodSpec(name, containers, **rest))
        self.pods.append(pod)
        return pod

    def remove_pods(self) -> None:
        """Remove every pod that was not removed, without grace."""
        for pod in list(self.pods):
            pod.remove(grace_s=0)

    def make_cgroup(self, path: str) -> None:
        """Make a cgroup of the node in every hierarchy."""
        for top in self.node.cgroups:
            below = top
            for part in path.strip("/").split("/"):
                below /= part
                if not below.is_dir():
                    below.mkdir()
                    cgroups.inherit_cpuset(below)

    def remove_cgroup(self, path: str) -> None:
        """Remove a cgroup of the node from every hierarchy."""
        for top in self.node.cgroups:
            cgroups.remove(top / path.strip("/"))


class Pod:
    """A pod: a sandbox and its containers. Leaving the context manager removes the pod."""

    def __init__(self, kubelet: Kubelet, spec: PodSpec) -> None:
        self.spec = spec
        self.uid = str(uuid.uuid4())
        self.sandbox_id = ""
        self.ips: tuple[str, ...] = ()
        """IPv4 first, then IPv6."""
        self.kubelet = kubelet
        self.node = kubelet.node
        self.containers = {each.name: Container(self, each) for each in spec.containers}
        seen = datetime.datetime.now(datetime.UTC).isoformat()
        self.config = podspec.sandbox_config(spec, self.uid, seen)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self in self.kubelet.pods:
            self.remove(grace_s=0)

    @property
    def ip(self) -> str:
        """Returns the pod's IPv4 address."""
        return self.ips[0]

    def container(self, name: str = "main") -> "Container":
        """Returns a container of the pod."""
        return self.containers[name]

    def run_sandbox(self) -> None:
        """Make volumes and cgroup, call RunPodSandbox, then write the pod's /etc/hosts, which needs
        the address.
        """
        self.kubelet.make_cgroup(podspec.cgroup_parent(self.spec, self.uid))
        self.node.path(self.config.log_directory).mkdir(parents=True, mode=0o755)
        for volume in self._volumes():
            self._make_volume(volume)
        self.sandbox_id = self.node.cri.run_pod_sandbox(self.config, self.spec.runtime_handler)
        network = self.node.cri.pod_sandbox_status(self.sandbox_id).network
        self.ips = (network.ip, *(each.ip for each in network.additional_ips))
        lines = ["# Kubernetes-managed hosts file.", "127.0.0.1\tlocalhost", "::1\tlocalhost"]
        lines += [f"{ip}\t{self.spec.name}" for ip in self.ips if ip]
        self.node.write(f"{podspec.PODS}/{self.uid}/etc-hosts", "\n".join(lines) + "\n")

    def _volumes(self) -> list[Volume]:
        mounted = [mount.volume for each in self.spec.containers for mount in each.mounts]
        if self.spec.service_account:
            mounted.append(podspec.service_account(self.spec))
        by_path = {podspec.volume_path(volume, self.uid): volume for volume in mounted}
        return [volume for volume in by_path.values() if not isinstance(volume, HostPath)]

    def volume(self, volume: Volume) -> Path:
        """Returns a volume of this pod as a path of the host."""
        return self.node.path(podspec.volume_path(volume, self.uid))

    def _make_volume(self, volume: Volume) -> None:
        path = self.volume(volume)
        path.mkdir(parents=True)
        if _in_memory(volume):
            inside = podspec.volume_path(volume, self.uid)
            self.node.run(["mount", "-t", "tmpfs", "tmpfs", inside])
        path.chmod(0o777)
        if isinstance(volume, ConfigMap):
            current = path / "..2026_01_01_00_00_00.1"
            current.mkdir()
            (path / "..data").symlink_to(current.name)
            for name, text in volume.files.items():
                (current / name).write_text(text)
                (path / name).symlink_to(f"..data/{name}")

    def remove(self, grace_s: int | None = None) -> None:
        """Delete the pod as kubelet does: containers, sandbox, then everything kept for them."""
        for container in self.containers.values():
            if container.id:
                container.stop(grace_s)
        cri = self.node.cri
        if self.sandbox_id:
            _unless_shim_ends(lambda: cri.stop_pod_sandbox(self.sandbox_id))
            for each in cri.containers(self.sandbox_id):
                cri.remove_container(each.id)
            cri.remove_pod_sandbox(self.sandbox_id)
        for volume in self._volumes():
            if _in_memory(volume):
                self.node.run(["umount", podspec.volume_path(volume, self.uid)])
        shutil.rmtree(self.node.path(f"{podspec.PODS}/{self.uid}"))
        shutil.rmtree(self.node.path(self.config.log_directory))
        self.kubelet.remove_cgroup(podspec.cgroup_parent(self.spec, self.uid))
        self.kubelet.pods.remove(self)


def _unless_shim_ends(stop: Callable[[], object]) -> None:
    """Stop, and again as kubelet does if the shim of a container that ends by itself hangs up.

    Raises grpc.RpcError for every other failure.
    """
    for again in range(STOPS_AT_MOST):
        try:
            stop()
        except grpc.RpcError as error:
            if SHIM_ENDED not in str(error) or again == STOPS_AT_MOST - 1:
                raise
            time.sleep(STOPS_EVERY_S)
        else:
            return


def _in_memory(volume: Volume) -> bool:
    match volume:
        case EmptyDir(_, in_memory):
            return in_memory
        case ConfigMap(_, _, kind):
            return kind != "configmap"
        case HostPath():
            return False


class Container:
    """A container of a pod, over all its restarts. `id` is the latest attempt's."""

    def __init__(self, pod: Pod, spec: ContainerSpec) -> None:
        self.pod = pod
        self.spec = spec
        self.id = ""
        self.attempt = 0
        self.start_called_s = 0.0
        """time.perf_counter() when StartContainer was called; `start_took_s` is how long for."""
        self.start_took_s = 0.0
        self._node = pod.node

    def create(self) -> str:
        """Call ImageStatus, CreateContainer; returns the new container's id. Raises
        grpc.RpcError.
        """
        image = self._node.cri.image_status(self.spec.image)
        if image is None:
            raise LookupError(f"{self.spec.image} was not imported to {self._node.name}")
        uid, name = self.pod.uid, self.spec.name
        termination = f"{podspec.PODS}/{uid}/containers/{name}/{secrets.token_hex(4)}"
        self._node.write(termination, "")
        self._node.path(termination).chmod(0o666)
        at = podspec.Placement(uid, self.attempt, image.id, termination)
        config = podspec.container_config(self.pod.spec, self.spec, at)
        self._node.path(f"{self.pod.config.log_directory}/{name}").mkdir(exist_ok=True)
        cri = self._node.cri
        self.id = cri.create_container(self.pod.sandbox_id, config, self.pod.config)
        return self.id

    def start(self) -> float:
        """Call StartContainer; returns the time of the call, by time.perf_counter(). Raises
        grpc.RpcError.
        """
        self.start_called_s = time.perf_counter()
        self._node.cri.start_container(self.id)
        self.start_took_s = time.perf_counter() - self.start_called_s
        return self.start_called_s

    def restart(self) -> str:
        """Replace an ended container by its next attempt, as kubelet's sync does.

        Gives the container a new id. The attempt before stays until the pod goes; older attempts
        are removed.
        """
        self.wait_exit()
        old = [each.id for each in self._all() if each.id != self.id]
        self.attempt += 1
        created = self.create()
        self.start()
        for each in old:
            self._node.cri.remove_container(each)
        return created

    def _all(self) -> list[pb.Container]:
        listed = self._node.cri.containers(self.pod.sandbox_id)
        return [each for each in listed if each.metadata.name == self.spec.name]

    def stop(self, grace_s: int | None = None) -> pb.ContainerStatus:
        """Call StopContainer with the pod's grace period or `grace_s`; returns the exit.

        Raises grpc.RpcError.
        """
        grace = self.pod.spec.grace_s if grace_s is None else grace_s
        _unless_shim_ends(lambda: self._node.cri.stop_container(self.id, grace))
        return self.status()

    def status(self) -> pb.ContainerStatus:
        """Call ContainerStatus; returns state, exit_code, reason and more."""
        return self._node.cri.container_status(self.id)

    def info(self) -> dict[str, Any]:
        """Returns the runtime's own view: `pid` (in the node), `runtimeSpec`, `snapshotKey` and
        more.
        """
        return self._node.cri.container_info(self.id)

    def stats(self) -> pb.ContainerStats:
        """Call ContainerStats."""
        return self._node.cri.container_stats(self.id)

    @property
    def host_pid(self) -> int:
        """Returns the container's init as the host sees it. Raises ProcessLookupError after its
        end.
        """
        return self._node.host_pid(int(self.info()["pid"]))

    @property
    def running(self) -> bool:
        """Returns whether CRI reports the container as running."""
        return self.status().state == pb.CONTAINER_RUNNING

    def wait_exit(self, timeout_s: float = 60) -> pb.ContainerStatus:
        """Wait until the container has ended; returns the exit. Raises TimeoutError."""
        self._wait(lambda: self.status().state == pb.CONTAINER_EXITED, "has not ended", timeout_s)
        return self.status()

    def exec(self, command: Sequence[str], timeout_s: int = 30) -> pb.ExecSyncResponse:
        """Call ExecSync; returns `stdout`, `stderr` (bytes) and `exit_code`."""
        return self._node.cri.exec_sync(self.id, command, timeout_s)

    def output(self, command: Sequence[str], timeout_s: int = 30) -> str:
        """Returns the standard output of a command in the container that must succeed."""
        done = self.exec(command, timeout_s)
        if done.exit_code:
            raise RuntimeError(f"{command} ended with {done.exit_code}: {done.stderr.decode()}")
        return done.stdout.decode()

    def exec_stream(self, command: Sequence[str], *, stdin: bool = False) -> Stream:
        """Exec with streams, as `kubectl exec` does."""
        return Stream.open(self._node, self._node.cri.exec_url(self.id, command, stdin=stdin))

    def attach(self) -> Stream:
        """Attach to the streams of the container's own process, as `kubectl attach` does."""
        url = self._node.cri.attach_url(self.id, stdin=self.spec.stdin, tty=self.spec.tty)
        return Stream.open(self._node, url)

    @property
    def log_path(self) -> Path:
        """Returns the current attempt's log as a path of the host."""
        directory = self.pod.config.log_directory
        return self._node.path(f"{directory}/{self.spec.name}/{self.attempt}.log")

    def log_lines(self) -> list[logs.LogLine]:
        """Returns all whole lines of the current attempt."""
        if not self.log_path.exists():
            return []
        return logs.parse(self.log_path.read_bytes().decode(errors="replace"))

    def logs(self) -> str:
        """Returns the container's output, as text."""
        return "".join(f"{line.text}\n" for line in self.log_lines())

    def wait_log(self, text: str, timeout_s: float = 60) -> str:
        """Wait until `text` is in the log; returns the first line with it. Raises TimeoutError."""
        self._wait(lambda: text in self.logs(), f"does not log {text!r}", timeout_s)
        return next(line.text for line in self.log_lines() if text in line.text)

    def _wait(self, done: Callable[[], bool], what: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{self.spec.name} of {self.pod.spec.name} {what}: {self.logs()}"
                )
            time.sleep(LOOK_EVERY_S)
