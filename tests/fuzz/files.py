"""Targets: files of ours that a storage writer, a power cut or an earlier version may have made."""

from __future__ import annotations

import atexit
import functools
import io
import json
import os
import shutil
import tempfile
from pathlib import Path

from hook.state import read_state
from shim.contract import journal, jsontext, manifest, names, outcome, ticket
from shim.contract.errors import BadManifest
from shim.contract.parts import ROOTFS
from shim.contract.paths import MEMORY_LAYOUT
from shim.criu import log
from shim.gate import volumes
from shim.integrity import marks, tree
from shim.kube import kubeconfig
from shim.memory import layout
from shim.memory.serve import workingset
from shim.network import readdress as patching
from shim.oci.spec import Spec
from shim.source import record
from shim.store import quarantine
from shim.trust import keyfile, signature
from tests.fuzz.invariants import Violated, refuses_with, same

SCRATCH = "QUICKTHAW_FUZZ_SCRATCH"


@functools.cache
def place() -> Path:
    """Returns a directory in memory for targets that take a path. SCRATCH's setter removes it."""
    if given := os.environ.get(SCRATCH):
        return Path(given)
    made = Path(tempfile.mkdtemp(prefix="quickthaw-fuzz-", dir="/dev/shm"))
    atexit.register(shutil.rmtree, made)
    return made


def tickets(data: bytes) -> None:
    """Decode a ticket, which must encode to the same ticket."""
    with refuses_with(ValueError):
        found = ticket.decode(data)
        same(ticket.decode(found.encode()).encode(), found.encode(), "encoded and decoded")
        if not names.is_container_id(found.container) or not names.is_snapshot_id(found.snapshot):
            raise Violated("a ticket with malformed names")


def manifests(data: bytes) -> None:
    """Decode a manifest, whose paths must all be beneath the snapshot."""
    with refuses_with(BadManifest):
        found = manifest.decode(data)
        same(manifest.decode(found.encode()), found, "encoded and decoded")
        for file in found.files:
            if file.path.startswith("/") or ".." in file.path.split("/"):
                raise Violated(f"a path that leads out: {file.path!r}")


def signatures(data: bytes) -> None:
    """Decode a signature file, which must have a single form."""
    with refuses_with(ValueError):
        same(signature.decode(data).encode(), data, "decoded and encoded")


def keys(data: bytes) -> None:
    """Parse key files, also from another node."""
    for parse in (keyfile.parse_public, keyfile.parse_private):
        with refuses_with(ValueError):
            found = parse(data)
            same(type(found.pem()), bytes, "a key in PEM")


def kubeconfigs(data: bytes) -> None:
    """Load a kubeconfig, with which an operator names an API server."""
    path = place() / "kubeconfig"
    path.write_bytes(data)
    with refuses_with(kubeconfig.BadKubeconfig, OSError):
        found = kubeconfig.load(str(path))
        if not found.host or not 0 < found.port < 65536:
            raise Violated(f"no server: {found.host!r} {found.port}")


def listings(data: bytes) -> None:
    """Parse the listing of a part, and compare it with the files on the disk."""
    lines = data.splitlines()
    for raw in lines:
        with refuses_with(ValueError):
            tree.Line(raw)
    there = place() / "part"
    if not there.exists():
        (there / "rootfs/etc").mkdir(parents=True)
        (there / "rootfs/etc/motd").write_bytes(b"x" * 12)
    fd = os.open(there, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with refuses_with(ValueError, tree.Mismatch):
            for line, entry in tree.pairs(ROOTFS, lines, tree.walk(fd, ROOTFS)):
                same(line.name, tree.text(entry.name), "a pair")
    finally:
        os.close(fd)


def volume_facts(data: bytes) -> None:
    """Parse the fact of files in volumes, which a restore compares."""
    with refuses_with(ValueError):
        fact = jsontext.parse(data)
        files, sockets_in = volumes.parse(fact)
        back = {
            "files": [each.as_json() for each in files], "made": volumes.made(fact),
            "sockets_in": sockets_in,
        }  # fmt: skip
        told = jsontext.canonical(back)
        again, _ = volumes.parse(jsontext.parse(told))
        same([each.as_json() for each in again], back["files"], "written and read")
        volumes.changed(
            Spec({"mounts": [{"destination": "/d", "type": "bind", "source": "/usr"}]}), fact
        )


def pod_records(data: bytes) -> None:
    """Parse the record of what a pod had when a container was created."""
    with refuses_with(ValueError, RecursionError):  # json.loads, of a file that is root's alone
        found = record.parsed(json.loads(data))
        if not all(type(each) is int for each in found.inodes):
            raise Violated(f"no inodes: {found}")


def records(data: bytes) -> None:
    """Decode records about a snapshot: of quarantine, or of counted failures."""
    for kind in (quarantine.Record, quarantine.Health):
        with refuses_with(ValueError):
            found = quarantine.decode(data, kind)
            back = quarantine.decode(quarantine.encode(found), kind)
            same(back, found, "encoded and decoded")


def verified_marks(data: bytes) -> None:
    """Read marks: unreadable marks count as none, readable marks can be compared."""
    directory = place() / "marks"
    (directory / "s").mkdir(parents=True, exist_ok=True)
    (directory / "s/rootfs").write_bytes(data)
    fd = os.open(place(), os.O_RDONLY | os.O_DIRECTORY)
    try:
        with refuses_with():
            found = marks.read("s", "rootfs", str(directory))
            marks.first_changed(fd, found)
            marks.is_sealed(fd, "marks", found)
    finally:
        os.close(fd)


def memory_layouts(data: bytes) -> None:
    """Decode a layout and its ranges, which must lie in order, within the file of data."""
    text, _, ranges = data.partition(b"\n")
    size = 1 << 30
    with refuses_with(layout.BadLayout, ValueError):
        found = layout.decode({MEMORY_LAYOUT: text, "r": ranges}, {"d": size})
        each: list[layout.SpaceLayout | layout.SharedLayout] = [*found.spaces, *found.shared]
        for space in each:
            behind = 0
            for start, end, offset in space.extents:
                if not behind <= start < end or offset + end - start > size:
                    raise Violated(f"{start:#x} to {end:#x} at {offset:#x} is out of order")
                behind = end
            same(layout.decode_ranges(layout.encode_ranges(space.extents)), space.extents, "ranges")


def working_sets(data: bytes) -> None:
    """Read the working set of earlier restores: an unreadable file counts as none."""
    directory = place() / "working-sets"
    directory.mkdir(exist_ok=True)
    (directory / "s.json").write_bytes(data)
    with refuses_with():
        found = workingset.read("s", str(directory))
        if found:
            workingset.write("t", found, str(directory))
            same(workingset.read("t", str(directory)), found, "written and read")


def hook_states(data: bytes) -> None:
    """Read the OCI state that a runtime gives to a hook."""
    with refuses_with(ValueError):
        found = read_state(io.BytesIO(data))
        if not names.is_container_id(found.container) or found.pid < 0:
            raise Violated(f"a state of no container: {found.container!r} {found.pid}")


def journals(data: bytes) -> None:
    """Read a journal, which gives kinds and subjects, the last first."""
    path = place() / "journal"
    path.write_bytes(data)
    with refuses_with(ValueError):
        for kind, _ in journal.changes(str(path)):
            same(type(kind), str, "a kind of change")


def outcomes(data: bytes) -> None:
    """Take an outcome, which must encode to the same outcome, and be gone afterwards."""
    path = place() / "c1.json"
    path.write_bytes(data)
    with refuses_with(ValueError):
        found = outcome.take("c1", str(place()))
        if found is None:
            raise Violated("an outcome that is there is not found")
        same(outcome.decode(found.encode()).encode(), found.encode(), "encoded and decoded")
    if path.exists():
        raise Violated("a damaged outcome stays, and is read again and again")


def criu_logs(data: bytes) -> None:
    """Search the logs of CRIU and runc, in which a container's names appear."""
    (place() / "restore.log").write_bytes(data)
    (place() / "runc.log").write_bytes(data)
    with refuses_with():
        same(type(log.first_error(str(place()), "restore.log")), str, "a reason")


def patches(data: bytes) -> None:
    """Patch files.img as a manifest says: the length must stay."""
    text, _, image = data.partition(b"\n")
    with refuses_with(ValueError):
        network = jsontext.parse(text)
        if not isinstance(network, dict):
            return
        found = patching.patches_of(network)
        chosen = patching.replacements([address for address, _ in found], ["10.1.2.3", "fd00::7"])
        same(len(patching.readdressed(image, found, chosen)), len(image), "the length")
    with refuses_with(ValueError):
        patching.renamed(image, "new-name")
