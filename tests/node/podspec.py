"""A pod author's spec, and the CRI messages that kubelet makes of it.

Pure: this module computes paths on the node, and `kubelet` makes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from protos import cri_pb2 as pb

PODS: Final = "/var/lib/kubelet/pods"
LOGS: Final = "/var/log/pods"
TERMINATION_LOG: Final = "/dev/termination-log"
SERVICE_ACCOUNT: Final = "/var/run/secrets/kubernetes.io/serviceaccount"
MASKED_PATHS: Final = (
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
)
READ_ONLY_PATHS: Final = (
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
)
SERVICE_ENVIRONMENT: Final = {
    "KUBERNETES_SERVICE_HOST": "10.96.0.1",
    "KUBERNETES_SERVICE_PORT": "443",
    "KUBERNETES_SERVICE_PORT_HTTPS": "443",
    "KUBERNETES_PORT": "tcp://10.96.0.1:443",
}


@dataclass(frozen=True, slots=True)
class HostPath:
    """A directory or file of the node, which has to be there."""

    path: str


@dataclass(frozen=True, slots=True)
class EmptyDir:
    """A directory that lives as long as the pod, on disk or (`in_memory`) in a tmpfs."""

    name: str
    in_memory: bool = False


@dataclass(frozen=True, slots=True)
class ConfigMap:
    """Files with given content, laid out with the symlinks that kubelet uses to change them."""

    name: str
    files: Mapping[str, str]
    kind: str = "configmap"
    """`configmap`, `secret` or `projected`: the directory's name, and whether it is in memory."""


Volume = HostPath | EmptyDir | ConfigMap


@dataclass(frozen=True, slots=True)
class VolumeMount:
    """A volume at a path of the container."""

    destination: str
    volume: Volume
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """A container of a pod. `command` replaces the image's entrypoint, `args` its command."""

    image: str
    name: str = "main"
    command: Sequence[str] = ()
    args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    mounts: Sequence[VolumeMount] = ()
    working_dir: str = ""
    user: int | None = None
    group: int | None = None
    supplemental_groups: Sequence[int] = ()
    add_capabilities: Sequence[str] = ()
    drop_capabilities: Sequence[str] = ()
    no_new_privs: bool = False
    privileged: bool = False
    read_only_root: bool = False
    seccomp: str = "RuntimeDefault"
    """`RuntimeDefault` or `Unconfined`."""
    memory_limit_bytes: int = 0
    cpu_limit_cores: float = 0.0
    cpu_request_cores: float = 0.0
    tty: bool = False
    stdin: bool = False
    devices: Sequence[str] = ()
    """Device nodes that a device plugin gives it, at the same paths as on the node."""


@dataclass(frozen=True, slots=True)
class PodSpec:
    """A pod. Missing fields have the API server's defaults."""

    name: str
    containers: Sequence[ContainerSpec]
    namespace: str = "default"
    annotations: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    sysctls: Mapping[str, str] = field(default_factory=dict)
    grace_s: int = 30
    service_account: bool = True
    share_processes: bool = False
    host_network: bool = False
    host_ipc: bool = False
    runtime_handler: str = ""

    @property
    def quality(self) -> str:
        """Returns the quality-of-service class, which is a directory of cgroups.

        Does not tell Guaranteed from Burstable: Guaranteed would be a directory less.
        """
        limited = any(c.memory_limit_bytes or c.cpu_limit_cores for c in self.containers)
        asked = any(c.cpu_request_cores for c in self.containers)
        return "burstable" if limited or asked else "besteffort"


def cgroup_parent(spec: PodSpec, uid: str) -> str:
    """Returns the pod's cgroup, as kubelet's cgroupfs driver names it."""
    return f"/kubepods/{spec.quality}/pod{uid}"


def log_directory(spec: PodSpec, uid: str) -> str:
    """Returns the directory of the pod's logs on the node."""
    return f"{LOGS}/{spec.namespace}_{spec.name}_{uid}"


def volume_path(volume: Volume, uid: str) -> str:
    """Returns the directory in which kubelet keeps a volume of pod `uid` on the node."""
    match volume:
        case HostPath(path):
            return path
        case EmptyDir(name):
            return f"{PODS}/{uid}/volumes/kubernetes.io~empty-dir/{name}"
        case ConfigMap(name, _, kind):
            return f"{PODS}/{uid}/volumes/kubernetes.io~{kind}/{name}"


def namespaces(spec: PodSpec) -> pb.NamespaceOption:
    """Returns the owners of namespaces: the pod, the container, or the node."""
    return pb.NamespaceOption(
        network=pb.NODE if spec.host_network else pb.POD,
        pid=pb.POD if spec.share_processes else pb.CONTAINER,
        ipc=pb.NODE if spec.host_ipc else pb.POD,
    )


def pod_labels(spec: PodSpec, uid: str) -> dict[str, str]:
    """Returns the labels that name the pod, on its sandbox and on its containers."""
    return {
        "io.kubernetes.pod.name": spec.name,
        "io.kubernetes.pod.namespace": spec.namespace,
        "io.kubernetes.pod.uid": uid,
    }


def sandbox_config(spec: PodSpec, uid: str, seen: str) -> pb.PodSandboxConfig:
    """Returns the sandbox of `spec`; `seen` is the time at which kubelet learnt of the pod (RFC
    3339).
    """
    default = pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault)
    annotations = {"kubernetes.io/config.seen": seen, "kubernetes.io/config.source": "api"}
    search = f"{spec.namespace}.svc.cluster.local svc.cluster.local cluster.local"
    return pb.PodSandboxConfig(
        metadata=pb.PodSandboxMetadata(name=spec.name, uid=uid, namespace=spec.namespace),
        hostname="" if spec.host_network else spec.name,
        log_directory=log_directory(spec, uid),
        dns_config=pb.DNSConfig(
            servers=["10.96.0.10"], searches=search.split(), options=["ndots:5"]
        ),
        labels={**spec.labels, **pod_labels(spec, uid)},
        annotations={**spec.annotations, **annotations},
        linux=pb.LinuxPodSandboxConfig(
            cgroup_parent=cgroup_parent(spec, uid),
            sysctls=spec.sysctls,
            security_context=pb.LinuxSandboxSecurityContext(
                namespace_options=namespaces(spec),
                seccomp=default,
                privileged=any(container.privileged for container in spec.containers),
            ),
        ),
    )


@dataclass(frozen=True, slots=True)
class Placement:
    """The node's own choices for a single start of a container."""

    uid: str
    attempt: int
    image_ref: str
    termination_log: str
    """The node's file behind TERMINATION_LOG."""


def container_config(spec: PodSpec, container: ContainerSpec, at: Placement) -> pb.ContainerConfig:
    """Returns a container of `spec`, as kubelet asks for it."""
    return pb.ContainerConfig(
        metadata=pb.ContainerMetadata(name=container.name, attempt=at.attempt),
        image=pb.ImageSpec(image=at.image_ref, user_specified_image=container.image),
        command=container.command,
        args=container.args,
        working_dir=container.working_dir,
        envs=[
            pb.KeyValue(key=key, value=value)
            for key, value in {**container.env, **SERVICE_ENVIRONMENT}.items()
        ],
        mounts=_mounts(spec, container, at),
        devices=[
            pb.Device(container_path=path, host_path=path, permissions="rw")
            for path in container.devices
        ],
        labels={"io.kubernetes.container.name": container.name, **pod_labels(spec, at.uid)},
        annotations=_annotations(spec, container, at),
        log_path=f"{container.name}/{at.attempt}.log",
        stdin=container.stdin,
        tty=container.tty,
        linux=pb.LinuxContainerConfig(
            resources=_resources(spec, container),
            security_context=_security_context(spec, container),
        ),
    )


def _annotations(spec: PodSpec, container: ContainerSpec, at: Placement) -> dict[str, str]:
    return {
        "io.kubernetes.container.hash": f"{sum(container.image.encode()):x}",
        "io.kubernetes.container.restartCount": str(at.attempt),
        "io.kubernetes.container.terminationMessagePath": TERMINATION_LOG,
        "io.kubernetes.container.terminationMessagePolicy": "File",
        "io.kubernetes.pod.terminationGracePeriod": str(spec.grace_s),
    }


def _mounts(spec: PodSpec, container: ContainerSpec, at: Placement) -> list[pb.Mount]:
    mounts = [
        pb.Mount(
            container_path=mount.destination,
            host_path=volume_path(mount.volume, at.uid),
            readonly=mount.read_only,
        )
        for mount in container.mounts
    ]
    if spec.service_account:
        source = volume_path(service_account(spec), at.uid)
        mounts.append(pb.Mount(container_path=SERVICE_ACCOUNT, host_path=source, readonly=True))
    if not spec.host_network:
        hosts = f"{PODS}/{at.uid}/etc-hosts"
        mounts.append(pb.Mount(container_path="/etc/hosts", host_path=hosts))
    mounts.append(pb.Mount(container_path=TERMINATION_LOG, host_path=at.termination_log))
    return mounts


def service_account(spec: PodSpec) -> ConfigMap:
    """Returns the projected volume that every pod gets, with a token for this pod."""
    files = {"ca.crt": "no certificate\n", "namespace": spec.namespace, "token": spec.name}
    return ConfigMap("kube-api-access-x7f2q", files, kind="projected")


def _resources(spec: PodSpec, container: ContainerSpec) -> pb.LinuxContainerResources:
    """Returns kubelet's numbers: 1024 shares are a core, and a period is 100 ms."""
    asked = container.cpu_request_cores or container.cpu_limit_cores
    return pb.LinuxContainerResources(
        cpu_period=100_000,
        cpu_quota=int(container.cpu_limit_cores * 100_000),
        cpu_shares=max(2, int(asked * 1024)),
        memory_limit_in_bytes=container.memory_limit_bytes,
        memory_swap_limit_in_bytes=container.memory_limit_bytes,
        oom_score_adj=1000 if spec.quality == "besteffort" else 900,
    )


def _security_context(spec: PodSpec, container: ContainerSpec) -> pb.LinuxContainerSecurityContext:
    unconfined = container.privileged or container.seccomp == "Unconfined"
    kind = pb.SecurityProfile.Unconfined if unconfined else pb.SecurityProfile.RuntimeDefault
    context = pb.LinuxContainerSecurityContext(
        capabilities=pb.Capability(
            add_capabilities=container.add_capabilities,
            drop_capabilities=container.drop_capabilities,
        ),
        privileged=container.privileged,
        namespace_options=namespaces(spec),
        supplemental_groups=container.supplemental_groups,
        readonly_rootfs=container.read_only_root,
        no_new_privs=container.no_new_privs,
        masked_paths=() if container.privileged else MASKED_PATHS,
        readonly_paths=() if container.privileged else READ_ONLY_PATHS,
        seccomp=pb.SecurityProfile(profile_type=kind),
    )
    if container.user is not None:
        context.run_as_user.value = container.user
    if container.group is not None:
        context.run_as_group.value = container.group
    return context
