"""Makes the first inputs of each target: `python -m tests.fuzz.seeds` writes them to the corpus.

Made by the product's own encoders where there are any, so that fuzzing begins behind the checks.
"""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

from protos import nri_pb2, ttrpc_pb2
from shim.contract import outcome
from shim.contract.errors import Blame
from shim.contract.outcome import Outcome
from shim.contract.ticket import Ticket
from shim.integrity import tree
from shim.memory import layout
from shim.rpc import mux, ttrpc
from shim.store import quarantine
from shim.trust import keyfile
from shim.trust.signature import Signature
from tests.fuzz.targets import TARGETS
from tests.unit.criu.test_images import MAGIC, field
from tests.unit.manifests import made

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

CORPUS = Path("tests/fuzz/corpus")
_SPEC = {
    "ociVersion": "1.2.0",
    "process": {
        "args": ["python3", "serve.py"], "cwd": "/", "env": ["A=b", "X_SERVICE_HOST=10.0.0.1",
        "X_SERVICE_PORT=80"], "user": {"uid": 0, "gid": 0, "additionalGids": [0, 10]},
        "capabilities": {"bounding": ["CAP_CHOWN"]}, "noNewPrivileges": True,
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1, "hard": 2}],
    },
    "root": {"path": "rootfs", "readonly": False},
    "annotations": {"org.criu.config": "/x"},
    "mounts": [
        {"destination": "/dev/shm", "source": "/a", "type": "bind", "options": ["rbind", "ro"]},
        {"destination": "/proc", "source": "proc", "type": "proc"},
    ],
    "linux": {
        "namespaces": [{"type": "network", "path": "/proc/1/ns/net"}, {"type": "pid"}],
        "devices": [{"path": "/dev/null", "type": "c", "major": 1, "minor": 3}],
        "resources": {"memory": {"limit": 1}, "devices": [{"allow": False, "access": "rwm"}]},
        "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"}, "maskedPaths": ["/proc/kcore"],
        "sysctl": {"net.x": "1"},
    },
}  # fmt: skip
_ANNOTATIONS = (
    "quickthaw.io/snapshot=auto\nquickthaw.io/capture-when=log:ready in [0-9.]+ ?s$",
    "quickthaw.io/restore=sha256:0123456789ab\nquickthaw.io/deadline=1m30s",
    "quickthaw.io/snapshot.server=warm\nquickthaw.io/resume=http POST :8000/wake\n"
    "quickthaw.io/quiesce=exec:sh -c 'a b'\nquickthaw.io/fallback=fail",
    "quickthaw.io/snapshot=x\nquickthaw.io/capture-when=tcp://:80\nquickthaw.io/on-restart=cold",
    "quickthaw.io/snapshot=x\nquickthaw.io/capture-when=http://:80/a",
    "quickthaw.io/snapshot=x\nquickthaw.io/capture-when=file:/run/ready",
)
_MOUNT = (
    "36 25 0:31 / /run/x/rootfs rw,relatime shared:9 - overlay overlay "
    "rw,lowerdir=/a/2/fs:/a/1/fs,upperdir=/a/3/fs,workdir=/a/3/work,index=off"
)

_KUBECONFIG = b"""
apiVersion: v1
current-context: c
contexts: [{name: c, context: {cluster: k, user: u}}]
clusters: [{name: k, cluster: {server: "https://10.0.0.1:6443/x"}}]
users: [{name: u, user: {token: abc}}]
"""


def seeds() -> Mapping[str, Iterable[bytes]]:
    """Returns the first inputs of each target."""
    return {
        "mux_frames": [b"\x07" + mux.encode(1, b"a") + mux.encode(2, b"b" * 70)],
        "ttrpc_frames": [b"\x05" + _request() + _response()],
        "nri_calls": [_nri()],
        "control_requests": [
            json.dumps({"verb": verb, "id": "3f2a", "pod": "p", "namespace": "n"}).encode() + b"\n"
            for verb in ("ls", "show", "rm", "capture", "quarantine", "release", "none")
        ],
        "tickets": [_ticket()],
        "manifests": [made().encode()],
        "signatures": [Signature("a" * keyfile.ID_DIGITS, b"s" * 64).encode()],
        "keys": [_key().pem(), _key().public.pem()],
        "listings": [tree.encode([0, ".", 16877, 0, 0, 0, 0, {}, 0], [], "")
                     + tree.encode([1, "etc", 16877, 0, 0, 0, 0, {"user.a": "00"}, 0], ["a"], "")],
        "records": [
            quarantine.encode(quarantine.Record("why", "X", Blame.CONTENT, 2, 1.0, "quickthawd")),
            quarantine.encode(quarantine.Health(1, "why", "X", 1.0, ("uid-1",))),
        ],
        "verified_marks": [b'{"schema":2,"marks":{"part":[1,2,3,4,5]}}'],
        "memory_layouts": [
            layout.encode(
                [{"pid": 1, "data": "d", "ranges": "r", "areas": [[0, 8192]], "huge": []}], []
            )
            + layout.encode_ranges([(4096, 8192, 0), (65536, 131072, 4096)])
        ],
        "working_sets": [b'{"schema": 1, "windows": [[1, 65536], [7, 0]]}'],
        "hook_states": [b'{"ociVersion":"1.0.2","id":"c1","pid":12,"bundle":"/b","status":"x"}'],
        "journals": [b'["rootfs",{"a":1}]\n["shm",["b"]]\n["done",null]\n["add'],
        "outcomes": [
            b'{"schema":1,"result":"cold","error":"","steps":{"criu":0.1}}',
            Outcome(
                snapshot="5" * 64, result=outcome.REFUSED, error="why", error_class="SwapTooLate",
                exit_code=26, refusals=["seccomp"], blame="restore", deadline_s=9, seconds=1.5,
                pod={"namespace": "n", "name": "p", "uid": "u", "container": "c"},
                steps={"criu": 0.1}, warnings=["w"], at=1e9,
            ).encode(),
        ],
        "criu_logs": [b"(00.01)      1: Error (criu/x.c:3): cannot\n", b'{"msg":"no"}\n'],
        "patches": [b'{"patches":[{"address":"10.0.0.1","offsets":[8]}]}\n' + b"x" * 24,
                    b"{}\n" + b"x" * 8 + struct.pack("<I", 6) + b"\x0a\x04name"],
        "kubeconfigs": [_KUBECONFIG],
        "snapshot_facts": [
            b'["avx","fpu"]\n[1,2]\n{"driver":"5","gpus":[["H100",1,false]]}\n[{"a":1}]\n{}\n'
            b'["fpu"]\n[3,2]\n"none"\n[{"a":2}]\n{"A":"b"}',
            b"6.18.2-amd64\n6.1",
        ],
        "criu_images": _images(),
        "open_files": _open_files(),
        "ipc_objects": [_ipc_objects()],
        "mount_points": [_mount_points()],
        "sysv_lists": [b"key shmid perms size cpid lpid\n0 5 600 4096 12 0\n126 6 600 1 12 0\n",
                       b"key semid perms nsems\n0 1 600 2\n", b"key msqid perms\n9 1 600\n"],
        "proc_files": [
            b"7f10-7f20 rw-s 00001000 00:1f 77         /dev/shm/\xff\r (deleted)\n",
            b"Name:\t\xff \\n\nVmRSS:\t   12 kB\nNSpid:\t7\t1\n",
            b"4:cpu,cpuacct:/a:b\n0::/pod/id\n", b"7 (a) b) S 1 7 7 0 -1",
        ],
        "volume_facts": [
            b'{"files":[{"at":[[1,"fd/5"],[1,"map_files/10-20"]],"gid":0,"gone":false,"mode":33188,'
            b'"path":"/d/bin/sh","rdev":0,"uid":0}],"made":["/dev/shm/x"],"sockets_in":["/d/lib"]}'
        ],
        "pod_records": [b'{"schema":1,"inodes":[1,2],"objects":["shm:5"],"is_whole":true}'],
        "oci_specs": [json.dumps(_SPEC).encode()],
        "pod_annotations": [text.encode() for text in _ANNOTATIONS],
        "log_expressions": [rb"ready in [0-9.]+ ?s$", rb"(model|engine) loaded", rb"(a+)+$"],
        "overlays": [_MOUNT.encode(), rb"/a\:b:/c"],
    }  # fmt: skip


def _request() -> bytes:
    call = ttrpc_pb2.Request(service="s", method="m", payload=b"p", timeout_nano=5)
    frame = ttrpc.Frame(1, ttrpc.FrameType.REQUEST, 0, call.SerializeToString())
    return ttrpc.encode_frame(frame)


def _response() -> bytes:
    answer = ttrpc_pb2.Response(payload=b"p").SerializeToString()
    return ttrpc.encode_frame(ttrpc.Frame(1, ttrpc.FrameType.RESPONSE, 0, answer))


def _nri() -> bytes:
    pod = nri_pb2.PodSandbox(id="p", name="n", annotations={"quickthaw.io/snapshot": "auto"})
    create = nri_pb2.CreateContainerRequest(pod=pod, container=nri_pb2.Container(id="c", name="s"))
    configure = nri_pb2.ConfigureRequest(runtime_name="r", request_timeout=2000)
    messages = (b"\x05" + create.SerializeToString(), b"\x00" + configure.SerializeToString())
    return b"\xff\xfe\xfd".join(messages)


def _ticket() -> bytes:
    return Ticket(
        container="c1", snapshot="a" * 64, fallback="cold", deadline_s=100.0, pod_namespace="n",
        pod_name="p", pod_uid="u", container_name="s", resume="", turns=2, turn_wait_s=1.0,
        turn_hold_s=60.0, gpu_pairs=[["GPU-" + "a" * 32, "GPU-" + "b" * 32]],
        others=0,
    ).encode()  # fmt: skip


def _key() -> keyfile.PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return keyfile.PrivateKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))


def _images() -> list[bytes]:
    address = int.from_bytes(bytes([10, 88, 0, 2]), "little")
    inner = field(1, 7) + field(3, 2) + field(7, 8000) + field(11, address) + field(12, 0)
    entry = field(1, 4) + field(2, 9) + field(4, inner)
    name = field(1, 1) + field(2, 3) + field(3, field(1, 3) + field(6, b"/x/gone"))
    link = field(1, 1) + field(2, 5) + field(3, field(1, 5) + field(6, b"/x/link.1"))
    remap = field(1, 3) + field(2, 5) + field(3, 0)
    files = MAGIC + b"".join(struct.pack("<I", len(each)) + each for each in (entry, name, link))
    return [files + b"\xff\xfe\xfd" + MAGIC + struct.pack("<I", len(remap)) + remap]


def _file(*entries: bytes) -> bytes:
    return MAGIC + b"".join(struct.pack("<I", len(each)) + each for each in entries)


def _open_files() -> list[bytes]:
    between = b"\xff\xfe\xfd"
    ids, tty = _file(field(6, 10)), _file(field(1, 7) + field(2, 1))
    named = field(1, 1) + field(2, 3) + field(3, field(1, 3) + field(2, 2) + field(6, b"/d/f"))
    tcp = field(4, 1) + field(5, 6) + field(7, 8000) + field(14, field(1, 9000) + field(25, 3))
    inet = field(1, 4) + field(2, 9) + field(4, tcp + field(18, 10) + field(16, field(1, 1)))
    netlink = field(1, 13) + field(2, 4) + field(7, field(3, 0) + field(8, 1) + field(13, 10))
    terminal = field(1, 11) + field(2, 6) + field(19, field(1, 6) + field(2, 7))
    packet = field(1, 10) + field(2, 8) + field(6, field(1, 8) + field(20, 10))
    all_in_one = _file(named, inet, netlink, terminal)
    return [between.join((all_in_one, tty, ids)), between.join((_file(packet), tty, ids))]


def _ipc_objects() -> bytes:
    def of(number: int, *more: bytes) -> bytes:
        return field(1, field(7, number)) + b"".join(more)

    shm = _file(of(1, field(2, 4096), field(3, 1)), of(7, field(3, 1)))
    sem = _file(of(1, field(2, 3))) + bytes(8) + _file(of(8, field(2, 5)))[8:] + bytes(16)
    msg = _file(of(5, field(3, 1)), field(2, 3)) + bytes(8) + _file(of(9, field(3, 0)))[8:]
    return b"\xff\xfe\xfd".join((shm, sem, msg))


def _mount_points() -> bytes:
    dev = field(1, 5) + field(3, 4) + field(6, b"/") + field(7, b"./dev")
    mask = field(1, 5) + field(3, 4) + field(6, b"/null") + field(7, b"./proc/kcore")
    empty = field(1, 5) + field(3, 5) + field(6, b"/") + field(7, b"./proc/acpi") + field(17, 1)
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as tar:
        root = tarfile.TarInfo(".")
        root.type, root.mode = tarfile.DIRTYPE, 0o1777
        tar.addfile(root)
    archive = gzip.compress(held.getvalue(), mtime=0)
    return _file(dev, mask + field(18, b"x"), empty) + b"\xff\xfe\xfd" + archive


def main() -> None:
    """Write all of them."""
    for name, inputs in seeds().items():
        directory = CORPUS / name
        directory.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(inputs):
            (directory / f"seed-{number}").write_bytes(data)
    assert seeds().keys() == TARGETS.keys()


if __name__ == "__main__":
    main()
