"""OCI specs for tests of the gate, and the snapshots and requests that belong to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shim.contract.paths import CONTAINERS
from shim.gate import gpu, key
from shim.gate.checks import CHECKS, DECISION, SWAP, WITHIN_SPEC, Check, findings
from shim.gate.facts import power_facts
from shim.gate.host import facts_of
from shim.gate.request import AtSwap, Node, Request
from shim.oci.spec import Spec
from tests.unit.manifests import SOFTWARE, made

if TYPE_CHECKING:
    from shim.contract.manifest import Manifest
    from shim.gate.facts import IsHost

Json = dict[str, Any]
OF_CAPTURE = {
    "processes": WITHIN_SPEC, "volume_files": '{"files":[],"made":[],"sockets_in":[]}',
    "descriptors": '{"lowest_port":0,"pings":false}',
}  # fmt: skip
"""Facts that a capture adds to the facts of its container."""
AUXILIARY = {6: 4096, 16: 0xFF, 26: 0b10, 51: 3632}
HOST = facts_of(["fpu", "sse2", "avx", "avx2", "xsave"], AUXILIARY, 2)
NODE = Node(
    arch="x86_64",
    kernel="6.18.9",
    criu="Version: 4.2.1",
    host=HOST,
    gpus={"gpus": []},
    trust=lambda _: ("signed", True),
)


def no_host(_path: str, _kind: str) -> bool:
    return False


def spec(pod: str = "1") -> Json:
    """Returns a spec as containerd's CRI plugin makes it, with everything that differs per pod from
    the pod's number.
    """
    sandbox = f"/run/containerd/io.containerd.grpc.v1.cri/sandboxes/{pod}"
    volumes = f"/var/lib/kubelet/pods/uid-{pod}/volumes"
    return {
        "ociVersion": "1.2.0",
        "process": {
            "user": {"uid": 1000, "gid": 1000, "additionalGids": [3, 2]},
            "args": ["serve"],
            "env": [
                "PATH=/bin", f"HOSTNAME=pod-{pod}", f"POD=pod-{pod}", f"IP=10.0.0.{pod}",
                "KUBERNETES_SERVICE_HOST=10.96.0.1", f"WEB_SERVICE_HOST=10.96.0.{pod}",
                f"WEB_SERVICE_PORT={pod}", f"WEB_PORT_80_TCP_ADDR=10.96.0.{pod}", "KEY=secret",
            ],
            "cwd": "/",
            "capabilities": {"bounding": ["CAP_KILL", "CAP_CHOWN"], "effective": ["CAP_KILL"]},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
            "oomScoreAdj": int(pod),
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": f"pod-{pod}",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]},
            {"destination": "/dev/shm", "type": "bind", "source": f"{sandbox}/shm",
             "options": ["rbind", "ro"]},
            {"destination": "/run/secrets/kubernetes.io/serviceaccount", "type": "bind",
             "source": f"{volumes}/kubernetes.io~projected/kube-api-access-abcd{pod}",
             "options": ["rbind", "ro"]},
            {"destination": "/models", "type": "bind", "source": "/srv/models",
             "options": ["rbind", "ro"]},
        ],
        "annotations": {"io.kubernetes.cri.sandbox-id": pod},
        "linux": {
            "cgroupsPath": f"/kubepods/{pod}",
            "namespaces": [
                {"type": "pid"}, {"type": "mount"},
                {"type": "network", "path": f"/proc/{pod}/ns/net"},
            ],
            "resources": {
                "devices": [{"allow": False, "access": "rwm"}],
                "memory": {"limit": 1 << 30},
                "cpu": {"shares": int(pod)},
            },
            "maskedPaths": ["/proc/kcore", "/proc/acpi"],
            "readonlyPaths": ["/proc/sys"],
            "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
        },
    }  # fmt: skip


def pod_of(number: str) -> key.PodValues:
    return key.PodValues(
        namespace="models", name=f"pod-{number}", uid=f"uid-{number}", ips=[f"10.0.0.{number}"]
    )


def power(given: Json, is_host: IsHost = no_host) -> dict[str, str]:
    return power_facts(Spec(given), is_host=is_host)


def workload(number: str = "1", changed: Json | None = None) -> dict[str, str]:
    return key.workload_facts(
        Spec(changed or spec(number)), pod_of(number), image_digest="sha256:1"
    )


def key_of(facts: dict[str, str]) -> str:
    return key.match_key(facts, namespace="models", power=None)


def changed(path: str, value: object, number: str = "2") -> Json:
    made_spec = spec(number)
    *parents, last = path.split("/")
    place: Any = made_spec
    for name in parents:
        place = place[int(name) if isinstance(place, list) else name]
    if isinstance(place, list):
        place[int(last)] = value
    else:
        place[last] = value
    return made_spec


CONTENT = '{"secret volume tls":"content 1"}'


def facts(given: Json, number: str = "1", *, node: Node = NODE) -> dict[str, str]:
    """Returns all that the gate compares of a container with this spec on this node."""
    found = Spec(given)
    gpus, granted = gpu.fact(found, node.gpus), power(given)
    return {
        **granted, **workload(number, given), **node.host, **({"gpu": gpus} if gpus else {}),
        **gpu.host_facts(found, gpu.chosen(found, node.gpus), granted["namespaces"]),
        "volume_content": CONTENT,
    }  # fmt: skip


def captured(given: Json | None = None, *, node: Node = NODE, **changes: Any) -> Manifest:
    """Returns the snapshot of pod 1 with this spec, taken on this node."""
    found = facts(spec("1") if given is None else given, node=node)
    fields = {
        "key": key_of(found), "facts": {**found, **OF_CAPTURE},
        "software": {**SOFTWARE, "arch": node.arch, "kernel": node.kernel, "criu": node.criu},
    }  # fmt: skip
    return made(**fields | changes)


def wanted(
    given: Json | None = None, number: str = "2", *, node: Node = NODE, **changes: Any
) -> Request:
    """Returns the request of pod 2 with this spec on this node."""
    chosen = spec(number) if given is None else given
    found = facts(chosen, number, node=node)
    ours = f"{CONTAINERS}/c2/criu.conf"
    fields: dict[str, Any] = {
        "facts": found, "memory_limit_bytes": Spec(chosen).memory_limit_bytes,
        "namespace": "models", "key": key_of(found), "node": node,
        "at_swap": AtSwap(
            ours=ours, named=ours, changed=lambda _: [], open_to_all=lambda: (1024, False)
        ),
    }  # fmt: skip
    return Request(**fields | changes)


def refused(
    snapshot: Manifest, request: Request, *, without: str = "", when: str = ""
) -> list[str]:
    """Returns the codes of the checks that refuse, at both times or at one; `without` leaves that
    check out.
    """
    table: tuple[Check, ...] = tuple(row for row in CHECKS if row.code != without)
    found = [
        each
        for time in ((when,) if when else (DECISION, SWAP))
        for each in findings(snapshot, request, time, table)
    ]
    return sorted({each.code for each in found if not each.fits})
