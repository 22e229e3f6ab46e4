"""The files of a restored container: the captured root file system, and the new pod's volumes."""

import hashlib
import statistics
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from tests.node.kubelet import Pod
from tests.node.node import Node
from tests.node.podspec import (
    SERVICE_ACCOUNT,
    ConfigMap,
    ContainerSpec,
    EmptyDir,
    HostPath,
    VolumeMount,
)
from tests.node.swapping import (
    SnapshotRef,
    answer,
    ask,
    assert_cold,
    captured,
    first_answer,
    nothing_left,
    probe,
    restored,
    said,
    wipe_snapshots,
    wishes,
)
from tests.workers.files import content

pytestmark = pytest.mark.usefixtures("nothing_left")

WHEN_TOLD = wishes(capture_when="signal")
GIB = 1 << 30
MTIME_NS = 1_234_567_890_123_456_789
CHANGES = (
    # New entries, with all attributes that an inode can have.
    "/write?path=/srv/new/file&size=70000&seed=2",
    "/xattr?path=/srv/new/file&name=user.origin&value=probe",
    "/mtime?path=/srv/new/file&ns={MTIME_NS}",
    "/chmod?path=/srv/new/file&mode=0o2640",
    "/link?path=/srv/new/second name&to=/srv/new/file",
    "/link?path=/srv/elsewhere&to=/srv/new/file",
    "/symlink?path=/srv/new/symlink&to=../new/file",
    "/symlink?path=/srv/new/dangling&to=/nowhere/at all",
    "/fifo?path=/srv/new/fifo",
    "/write?path=/srv/new/sparse&size=4096&seed=3&offset=268435456",
    "/write?path=/srv/new/empty&size=0",
    "/write?path=/srv/new/näme with spaces&size=10",
    "/mkdir?path=/srv/new/directory/below",
    "/mtime?path=/srv/new/directory&ns={MTIME_NS}",
    "/xattr?path=/srv/new/directory&name=user.of&value=a directory",
    # Entries of the image: changed, gone, and hidden by a new directory of their name.
    "/write?path=/etc/issue&size=300&seed=4",
    "/chmod?path=/etc/issue.net&mode=0o600",
    "/delete?path=/etc/debian_version",
    "/delete?path=/etc/dpkg",
    "/opaque?path=/etc/apt",
    "/write?path=/etc/apt/new&size=20",
    # Entries that processes hold.
    "/hold?name=open&path=/srv/open&size=5000&seed=5",
    "/hold?name=deleted&path=/srv/deleted&size=1500000&seed=6&delete=1",
    "/hold?name=mapped&path=/srv/mapped&size=9000&seed=7&map=1",
    "/hold?name=only mapped&path=/srv/only mapped&size=9000&seed=8&map=1&delete=1",
)


def change(pod: Pod) -> None:
    """Have the probe change its root file system in every way, then report itself ready."""
    for request in CHANGES:
        ask(pod, quote(request.format(MTIME_NS=MTIME_NS), safe="/?=&"))
    ask(pod, "/ready")


def tree(pod: Pod, path: str) -> dict[str, dict[str, Any]]:
    """Returns everything below `path` as the container sees it, without attributes that no copy
    keeps.
    """
    found = ask(pod, f"/tree?path={path}")
    return {name: kept(facts) for name, facts in found.items()}


def kept(facts: dict[str, Any]) -> dict[str, Any]:
    lost = {"device", "inode", "blocks"}
    if facts["kind"] == "directory":
        lost |= {"size", "nlink"}  # the file system's own business
    return {name: value for name, value in facts.items() if name not in lost}


def test_restored_root_file_system_equals_the_captured_in_every_detail(swap_node: Node) -> None:
    spec = probe(env={"CASE": "files"})
    source = captured(swap_node, spec, annotations=WHEN_TOLD, before=change).source
    pod = restored(swap_node, spec, annotations=WHEN_TOLD)
    pods = (source, pod)
    for path in ("/srv", "/etc/apt", "/opt"):
        assert tree(pod, path) == tree(source, path)
    there, here = (ask(each, "/tree?path=/etc") for each in pods)
    assert here.keys() == there.keys()
    assert here["issue"]["sha256"] == hashlib.sha256(content(4, 300)).hexdigest()
    assert here["issue.net"]["mode"] == "0o600"
    assert "debian_version" not in here
    assert "dpkg" not in here
    assert here["apt"]["entries"] == ["new"]

    new = ask(pod, "/tree?path=/srv/new")
    assert new["file"]["mtime_ns"] == new["directory"]["mtime_ns"] == MTIME_NS
    assert new["file"]["mode"] == "0o2640"
    assert new["file"]["xattrs"]["user.origin"] == b"probe".hex()
    assert new["file"]["nlink"] == 3
    assert ask(pod, "/read?path=/srv/elsewhere")["inode"] == new["second name"]["inode"]
    assert (new["sparse"]["size"], new["sparse"]["blocks"] * 512 < 1 << 20) == (268439552, True)

    for each in pods:
        held = ask(each, "/held")
        assert {name: file["ok"] for name, file in held.items()} == dict.fromkeys(held, True)
        deleted = {name for name, file in held.items() if file["deleted"]}
        assert deleted == {"deleted", "only mapped"}
    writes_are_its_own(source, pod)


def writes_are_its_own(source: Pod, pod: Pod) -> None:
    """Assert that no other container sees a restored container's changes, also of the captured
    diff.
    """
    before = tree(source, "/srv")
    for request in ("/append?name=open&text=more", "/append?name=deleted&text=more"):
        assert ask(pod, request)["ok"]
    ask(pod, "/delete?path=/srv/new")
    ask(pod, "/write?path=/etc/dpkg/again&size=5")
    ask(pod, "/write?path=/srv/new/file&size=5&seed=9")
    assert ask(pod, "/tree?path=/srv/new").keys() == {"file"}
    assert ask(pod, "/read?path=/etc/dpkg")["entries"] == ["again"]
    assert tree(source, "/srv") == before
    assert answer(source, "/read?path=/etc/dpkg").status == 409


# A large diff


@pytest.fixture(scope="module")
def large(swap_node: Node) -> Iterator[SnapshotRef]:
    """Yields a snapshot of a container that has written 1 GiB to its root file system."""

    def write(pod: Pod) -> None:
        for number in range(4):
            ask(pod, f"/write?path=/srv/large-{number}&size={GIB // 4}&seed={number}")
        ask(pod, "/ready")

    with nothing_left(swap_node):
        taken = captured(swap_node, LARGE, annotations=WHEN_TOLD, before=write)
    yield taken
    wipe_snapshots(swap_node)


LARGE, SMALL = probe(env={"CASE": "large"}), probe(env={"CASE": "small"})


def start_s(node: Node, spec: ContainerSpec) -> float:
    """Returns the seconds of StartContainer for a restored container."""
    with restored(node, spec, annotations=WHEN_TOLD) as pod:
        first_answer(pod)
        return pod.container().start_took_s


def test_frozen_and_restore_time_do_not_grow_with_the_size_of_the_diff(
    swap_node: Node, large: SnapshotRef
) -> None:
    small = captured(swap_node, SMALL, annotations=WHEN_TOLD, before=lambda pod: ask(pod, "/ready"))
    swap_node.kubelet.remove_pods()
    assert large.manifest()["sizes"]["rootfs"] >= GIB
    assert small.manifest()["sizes"]["rootfs"] < 1 << 20
    frozen = {each.source: each.manifest()["timings"]["frozen"] for each in (large, small)}
    assert frozen[large.source] < 2 * frozen[small.source] + 0.3, frozen
    times: dict[str, list[float]] = {"large": [], "small": []}
    for _ in range(3):
        times["large"].append(start_s(swap_node, LARGE))
        times["small"].append(start_s(swap_node, SMALL))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    assert medians["large"] < 2 * medians["small"] + 0.1, times


def test_restored_containers_share_a_gib_of_changed_files(
    swap_node: Node, large: SnapshotRef
) -> None:
    pod = restored(swap_node, LARGE, annotations=WHEN_TOLD)
    quarter = ask(pod, "/read?path=/srv/large-3")
    wanted = hashlib.sha256(content(3, GIB // 4)).hexdigest()
    assert (quarter["size"], quarter["sha256"]) == (GIB // 4, wanted)
    used = pod.container().stats().writable_layer.used_bytes.value
    assert used < 1 << 20, "the diff is mounted, not copied"


# Volumes


OTHER_CONTENT = {**WHEN_TOLD, "quickthaw.io/volume-content": "ignore"}


def with_volumes(setting: str) -> ContainerSpec:
    """Returns a probe with a volume of each kind; `setting` is in its ConfigMap."""
    mounts = [
        VolumeMount("/disk", EmptyDir("disk")),
        VolumeMount("/memory", EmptyDir("memory", in_memory=True)),
        VolumeMount("/config", ConfigMap("config", {"setting": setting}), read_only=True),
        VolumeMount("/secret", ConfigMap("secret", {"key": setting}, "secret"), read_only=True),
        VolumeMount("/host", HostPath("/srv/host")),
        VolumeMount("/tmp", EmptyDir("tmp")),
    ]
    return probe(env={"CASE": "volumes"}, mounts=mounts, read_only_root=True)


def use_volumes(pod: Pod) -> None:
    """Leave a file in each volume that can be written."""
    for path in ("/disk", "/memory", "/host", "/tmp"):
        ask(pod, f"/write?path={path}/of-{pod.spec.name}&size=10")
    ask(pod, "/ready")


def test_restored_container_sees_the_volumes_of_its_own_pod(swap_node: Node) -> None:
    host = swap_node.path("/srv/host")
    host.mkdir(exist_ok=True)
    source = captured(
        swap_node, with_volumes("old"), annotations=OTHER_CONTENT, before=use_volumes
    ).source
    pod = restored(swap_node, with_volumes("new"), annotations=OTHER_CONTENT)
    for path in ("/disk", "/memory", "/tmp"):
        assert ask(pod, f"/read?path={path}")["entries"] == [], "a new pod's are empty"
        assert ask(source, f"/read?path={path}")["entries"] == ["of-source"]
    use_volumes(pod)
    assert ask(pod, "/read?path=/host")["entries"] == ["of-replica", "of-source"]
    assert pod.volume(EmptyDir("disk")).joinpath("of-replica").exists()
    for path in ("/config/setting", "/secret/key"):
        assert ask(pod, f"/read?path={path}")["target"] == f"..data/{path.split('/')[-1]}"
        assert pod.container().output(["cat", path]) == "new"
        assert source.container().output(["cat", path]) == "old"
    assert pod.container().output(["cat", f"{SERVICE_ACCOUNT}/token"]) == "replica"
    for path in ("/new", "/etc/issue", "/config/setting"):
        refused = answer(pod, f"/write?path={path}&size=1")
        assert (refused.status, refused.json()["errno"]) == (409, "EROFS"), path
    mounts = {each["destination"]: each for each in ask(pod, "/mounts")}
    assert mounts["/memory"]["type"] == "tmpfs"
    assert mounts["/"]["options"].startswith("ro")
    assert options(pod) == options(source)


def options(pod: Pod) -> dict[str, set[str]]:
    """Returns the options of every mount that permit or forbid something."""
    return {
        each["destination"]: set(each["options"].split(",")) - {"relatime"}
        for each in ask(pod, "/mounts")
    }


def test_open_file_in_a_volume_of_the_old_pod_is_a_cold_start(swap_node: Node) -> None:
    mount = VolumeMount("/disk", EmptyDir("disk"))
    spec = probe(env={"CASE": "open in a volume"}, mounts=[mount])

    def hold(pod: Pod) -> None:
        ask(pod, "/hold?name=open&path=/disk/open&size=10")
        ask(pod, "/ready")

    snapshot = captured(swap_node, spec, annotations=WHEN_TOLD, before=hold)
    pod = swap_node.kubelet.run_pod("replica", [spec], annotations=WHEN_TOLD)
    assert_cold(pod.container())
    assert first_answer(pod)["nonce"] != snapshot.nonce
    line = said(swap_node, pod.container().id[:12], "cannot restore the process tree")
    assert "disk/open" in line
    log = swap_node.path(line.rpartition("CRIU's log: ")[2].rstrip("."))
    assert "disk/open" in log.read_text(errors="replace")
    log.unlink()  # the log outlives the container, so that people can read it
