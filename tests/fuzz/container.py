"""Targets: input that a container, its image or its pod's author influences."""

from __future__ import annotations

import json
import os
import re
import shutil
from typing import TYPE_CHECKING

from protos import criu_pb2
from shim.contract.errors import BadAnnotation
from shim.criu import images, ipcobjects, masks, openfiles
from shim.gate import descriptors
from shim.gate.checks import DECISION, SWAP, findings
from shim.gate.facts import power_facts
from shim.gate.key import PodValues
from shim.gate.kinds import Abilities
from shim.gate.request import NOWHERE, Node, Request, request_at_swap, request_of
from shim.kernel import mounts, procfs, sysvipc
from shim.oci.bundle import Bundle
from shim.oci.spec import Spec
from shim.rootfs import overlay
from shim.workload import annotations as pods
from shim.workload import logregex
from tests.fuzz.files import place
from tests.fuzz.invariants import Violated, refuses_with, same
from tests.unit.manifests import SOFTWARE, made

if TYPE_CHECKING:
    from pathlib import Path

_ADDRESSES = ("10.88.0.2", "fd00:88::2")
_BETWEEN = b"\xff\xfe\xfd"
_HOSTILE = ("a" * 60 + "!", "ab" * 30, "aaab" * 15, " " * 60, "a" * 30 + "b" * 30)


def criu_images(data: bytes) -> None:
    """Read CRIU's images: damaged, or with the same entries after padding the addresses."""
    directory = place() / "criu"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    files, _, remaps = data.partition(b"\xff\xfe\xfd")
    (directory / "files.img").write_bytes(files)
    (directory / "remap-fpath.img").write_bytes(remaps or files)
    for read in (images.link_remaps, images.ghosts, images.socket_directories):
        with refuses_with(images.DamagedImage, FileNotFoundError):  # the image of a ghost
            read(directory)
    with refuses_with(images.DamagedImage):
        before = [_entry(entry) for entry in images.entries(directory / "files.img")]
        images.make_patchable(directory, _ADDRESSES)
        after = [_entry(entry) for entry in images.entries(directory / "files.img")]
        same(after, before, "made patchable")


def open_files(data: bytes) -> None:
    """Compare the open files of CRIU's images with what nobody, and everybody, may have."""
    directory = _criu(data, "files.img", "tty-info.img", "ids-1.img")
    bounds, tcp = Abilities(212_992, 212_992, 1024, pings=False), descriptors.Tcp(4 << 20, 6 << 20)
    with refuses_with(images.DamagedImage):
        for named in openfiles.named_files(directory):
            if not named.path.startswith("/"):
                raise Violated(f"no absolute path: {named.path!r}")
    with refuses_with(images.DamagedImage):
        netns = openfiles.network_namespace(directory)
        nobody, root = (
            descriptors.excess(openfiles.open_files(directory), has, bounds, tcp, netns)
            for has in (0, (1 << 41) - 1)
        )
        if root and not nobody:
            raise Violated(f"more is refused with all power: {root}")
        if not nobody:
            descriptors.by_network(openfiles.open_files(directory), 0)


def ipc_objects(data: bytes) -> None:
    """Take System V objects out of CRIU's images: what is left is a part of what was there."""
    names = [f"ipcns-{kind}-10.img" for kind in sysvipc.KINDS]
    directory = _criu(data, *names)
    objects = [sysvipc.Object(kind, number, 0, 0) for kind in sysvipc.KINDS for number in (1, 5)]
    with refuses_with(images.DamagedImage):
        ipcobjects.leave_out(directory, objects)
        kept = [(directory / name).read_bytes() for name in names]
        ipcobjects.leave_out(directory, objects)
        same([(directory / name).read_bytes() for name in names], kept, "taken out twice")


def mount_points(data: bytes) -> None:
    """Rewrite the mounts of CRIU's images that mask files and directories."""
    directory = _criu(data, "mountpoints-10.img", "tmpfs-dev-5.tar.gz.img")
    for change in (masks.own_null, masks.mount_bare):
        with refuses_with(ValueError):  # DamagedImage, and a mask from elsewhere
            change(directory)
            once = (directory / "mountpoints-10.img").read_bytes()
            change(directory)
            same((directory / "mountpoints-10.img").read_bytes(), once, "changed twice")


def sysv_lists(data: bytes) -> None:
    """Read a list of System V objects as /proc has it."""
    lines = data.decode(errors="replace").splitlines()
    for kind in sysvipc.KINDS:
        with refuses_with(ValueError):
            found = list(sysvipc.listed(kind, lines, 3))
            if len(found) > 3 or any(each.kind != kind for each in found):
                raise Violated(f"not at most three of {kind}: {found}")


def proc_files(data: bytes) -> None:
    """Parse files of /proc/PID, in which a container chooses the names."""
    for parse in (procfs.fields, procfs.sizes, procfs.cgroup_rows, procfs.stat_fields):
        with refuses_with(ValueError):
            parse(data)
    for line in data.split(b"\n"):
        with refuses_with(ValueError):
            area = procfs.area(line)
            if not line.endswith(area.name) or os.fsencode(area.path) != area.name:
                raise Violated(f"another name than in the line: {area.name!r}")
            same(area.map_file, "{:x}-{:x}".format(*area.range), "the addresses")


def _criu(data: bytes, *names: str) -> Path:
    """A directory with these images; what is missing of them is as what comes before."""
    directory = place() / "criu"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    parts = data.split(_BETWEEN)
    for number, name in enumerate(names):
        (directory / name).write_bytes(parts[min(number, len(parts) - 1)])
    return directory


def _entry(raw: bytes) -> bytes:
    """Returns protobuf's reading of an entry, in its single form."""
    try:
        return criu_pb2.FileEntry.FromString(raw).SerializeToString(deterministic=True)
    except Exception as error:
        raise images.DamagedImage(str(error)) from error


def oci_specs(data: bytes) -> None:
    """Read an OCI spec: facts, keys, the requests of the gate, and the bundle."""
    bundle = place() / "bundle"
    bundle.mkdir(exist_ok=True)
    (bundle / "config.json").write_bytes(data)
    with refuses_with(ValueError):
        found = Bundle(str(bundle))
        told = (
            found.rootfs, found.spec.namespace("network"), found.spec.bind_source("/dev/shm"),
            *found.spec.environment.items(),
        )  # fmt: skip
        same({type(text) for part in told for text in ([part] if isinstance(part, str) else part)},
             {str}, "parts of a bundle")  # fmt: skip
    with refuses_with(ValueError, RecursionError):  # specs that no JSON can hold
        spec = json.loads(data)
        if isinstance(spec, dict):
            _facts(Spec(spec))


def _facts(spec: Spec) -> None:
    pod = PodValues(namespace="n", name="p", uid="u", ips=("10.0.0.1",), node="w")
    first = power_facts(spec, is_host=lambda *_: False)
    same(power_facts(spec, is_host=lambda *_: False), first, "the facts of one spec")
    if spec.memory_limit_bytes < 0 or spec.cpus < 0 or min(spec.owner) < 0:
        raise Violated("a negative number")
    request_at_swap(spec, "c1")
    asked = request_of(spec, pod, NOWHERE, image_digest="sha256:1")
    for name, fact in asked.facts.items():
        if not isinstance(fact, str):
            raise Violated(f"the fact {name} is no text")


def snapshot_facts(data: bytes) -> None:
    """Compare facts of a snapshot and of a container: every check must give its findings."""
    texts = [text.decode(errors="replace") for text in data.split(b"\n")]
    half = len(texts) // 2
    captured = _named(texts[:half])
    software = {**SOFTWARE, "kernel": texts[0], "criu": texts[-1]}
    found = made(facts=captured, software=software)
    node = Node(
        arch="x86_64", kernel=texts[-1], criu=texts[0], host={}, gpus=None,
        trust=lambda _: ("a key", True),
    )  # fmt: skip
    asked = Request(facts=_named(texts[half:]), memory_limit_bytes=0, namespace="n", node=node)
    with refuses_with():
        for when in (DECISION, SWAP):
            for finding in findings(found, asked, when):
                same(type(str(finding)), str, "a finding in words")
                json.dumps(finding.as_json())


def _named(texts: list[str]) -> dict[str, str]:
    """Returns the texts as facts: values of the parsed facts come first."""
    return dict(zip(("cpu_features", "cpu_hwcap", "gpu", "mounts", "env"), texts, strict=False))


def pod_annotations(data: bytes) -> None:
    """Parse annotations of a pod: a wish within bounds, no wish, or the single error."""
    pairs = [line.partition(b"=") for line in data.split(b"\n")]
    found = {
        key.decode(errors="surrogateescape"): value.decode(errors="surrogateescape")
        for key, _, value in pairs
    }
    with refuses_with(BadAnnotation):
        wish = pods.parse(found, "server")
        for call in (wish.quiesce, wish.resume) if wish else ():
            if isinstance(call, pods.HttpCall):
                same(pods.workload_call(call.encode()), call, "a call in a ticket")
        if wish and isinstance(wish.capture_when, pods.LogReady):
            _searched(wish.capture_when.pattern)


def log_expressions(data: bytes) -> None:
    """Match a regular expression of a pod's author, or refuse it; never in exponential time."""
    with refuses_with(ValueError):
        pattern = data.decode()
        logregex.checked(pattern)
        _searched(pattern)


def _searched(pattern: str) -> None:
    compiled = re.compile(pattern)
    for line in _HOSTILE:
        compiled.search(line)


def overlays(data: bytes) -> None:
    """Parse a line of the mount table, and the options of an overlay in the line."""
    with refuses_with(ValueError):
        for mount in mounts.parse_mountinfo(data):
            mounts.mount_flags(mount.options)
            found = overlay.Overlay(mount)
            for lower in found.absolute_lowerdirs():
                if not lower:
                    raise Violated("an empty lowerdir")
    with refuses_with(ValueError):
        text = os.fsdecode(data)
        lowerdirs = overlay.split_lowerdirs(text)
        back = overlay.split_lowerdirs(overlay.join_lowerdirs(lowerdirs))
        same(back, lowerdirs, "joined and split")
