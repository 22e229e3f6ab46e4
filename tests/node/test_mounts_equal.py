"""The mount table of a restored container is that of a cold one, in everything but numbers."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from shim.kernel.mounts import Mount, read_mounts
from tests.node import criu_user
from tests.node.attacking import own_snapshot, own_spec, start_victim
from tests.node.kubelet import Container
from tests.node.node import Node
from tests.node.podspec import ConfigMap, EmptyDir, VolumeMount
from tests.node.swapping import assert_cold, assert_restored, first_answer, wipe_snapshots

pytestmark = pytest.mark.usefixtures("nothing_left")

VOLUMES: Final = [
    VolumeMount("/disk", EmptyDir("disk")),
    VolumeMount("/memory", EmptyDir("memory", in_memory=True)),
    VolumeMount("/config", ConfigMap("config", {"a": "b"}), read_only=True),
]
SHAPES: Final[dict[str, dict[str, Any]]] = {
    "plain": {},
    "volumes, read-only root": {"mounts": VOLUMES, "read_only_root": True},
    "powerless": {
        "user": 1000,
        "group": 1000,
        "drop_capabilities": ("ALL",),
        "no_new_privs": True,
    },
    "unconfined": {"seccomp": "Unconfined"},
}


@pytest.fixture(autouse=True, scope="module")
def no_snapshots_after_it(swap_node: Node) -> Iterator[None]:
    yield
    wipe_snapshots(swap_node)


class Table:
    """The mounts of a container. Numbers become words: whose file system, whose inode."""

    def __init__(self, container: Container) -> None:
        self._pid = container.host_pid
        node = read_mounts(f"/proc/{container.pod.node.pid}/mountinfo")
        self._of_node = {each.device for each in node}
        self._ids = {
            container.id: "CONTAINER", container.pod.sandbox_id: "SANDBOX",
            container.pod.uid: "POD", container.pod.spec.name: "NAME",
        }  # fmt: skip
        self._mounts = read_mounts(f"/proc/{self._pid}/mountinfo")
        self._devices: dict[str, str] = {}
        self._inodes: dict[tuple[int, int], str] = {}
        for each in self._mounts:
            name = "the node's" if each.device in self._of_node else f"first at {each.target}"
            self._devices.setdefault(each.device, name)

    def rows(self) -> dict[str, list[dict[str, object]]]:
        """Returns all visible properties of each mount, by its place."""
        by_id = {each.mount_id: each.target for each in self._mounts}
        self._inodes = {}
        for path in ("/dev/null", "/dev/zero", "/dev/ptmx", "/proc", "/sys"):
            self._inode(path)
        found: dict[str, list[dict[str, object]]] = {}
        for each in sorted(self._mounts, key=lambda mount: mount.target):
            row = self._row(each, by_id.get(each.parent_id, "none"))
            found.setdefault(each.target, []).append(row)
        return found

    def _row(self, mount: Mount, parent: str) -> dict[str, object]:
        status = os.stat(f"/proc/{self._pid}/root{mount.target}")
        layers = ("lowerdir", "upperdir", "workdir", "index")  # the diff is another layer
        options = [f"{name}={value}" for name, value in mount.pairs() if name not in layers]
        return {
            "parent": parent,
            "file system": self._devices[mount.device],
            "type": mount.fstype,
            "source": self._plain(mount.source),
            "root": self._plain(mount.root),
            "flags": sorted(mount.options),
            "options": sorted(options),
            "propagation": sorted(each.partition(":")[0] for each in mount.propagation),
            "inode": self._inode(mount.target),
            "mode": oct(status.st_mode),
            "owner": (status.st_uid, status.st_gid),
            "device": (os.major(status.st_rdev), os.minor(status.st_rdev)),
        }

    def _inode(self, path: str) -> str:
        status = os.stat(f"/proc/{self._pid}/root{path}")
        return self._inodes.setdefault((status.st_dev, status.st_ino), f"first at {path}")

    def _plain(self, text: str) -> str:
        for number, word in self._ids.items():
            text = text.replace(number, word)
        return re.sub("/containers/main/[0-9a-f]+$", "/containers/main/ATTEMPT", text)


def table(container: Container) -> dict[str, list[dict[str, object]]]:
    return Table(container).rows()


@pytest.mark.parametrize("shape", SHAPES)
def test_restored_container_has_the_mounts_of_a_cold_container(swap_node: Node, shape: str) -> None:
    fields = SHAPES[shape]
    with criu_user.dumping(swap_node, fields.get("user", 0), fields.get("group", 0)):
        taken = own_snapshot(swap_node, f"mounts {shape}", fields)
    restored = start_victim(swap_node, f"mounts {shape}", fields, taken.id)
    assert_restored(restored.container())
    there = table(restored.container())
    restored.remove(grace_s=0)
    cold = swap_node.kubelet.run_pod("victim", [own_spec(f"mounts {shape}", **fields)])
    first_answer(cold)
    assert_cold(cold.container())
    here = table(cold.container())
    assert {place: len(rows) for place, rows in there.items()} == {
        place: len(rows) for place, rows in here.items() if place != "/run/quickthaw"
    } | ({"/run/quickthaw": 1})
    differing = {
        place: (rows, there[place]) for place, rows in here.items() if rows != there[place]
    }
    assert differing == {}, "\n".join(map(str, differing.items()))


@pytest.mark.attack("a restored container changes the mode of the node's /dev/null")
def test_restored_container_changes_only_its_own_null_device(swap_node: Node) -> None:
    taken = own_snapshot(swap_node, "null", {})
    pod = start_victim(swap_node, "null", {}, taken.id)
    assert_restored(pod.container())
    null = Path(f"/proc/{swap_node.pid}/root/dev/null")
    before = (null.stat().st_mode, null.stat().st_uid)
    masked = [
        place for place, rows in table(pod.container()).items()
        if rows[-1]["device"] == (1, 3) and place != "/dev/null"
    ]  # fmt: skip
    assert masked, "the runtime puts the null device over files that are not to be seen"
    try:
        for place in masked:
            pod.container().exec(["sh", "-c", f"chmod 0600 {place}; chown 7 {place}"])
        assert (null.stat().st_mode, null.stat().st_uid) == before
    finally:
        null.chmod(before[0] & 0o7777)
        os.chown(null, before[1], 0)


# The cgroups that a container sees

LIMITS: Final[dict[str, Any]] = {
    "memory_limit_bytes": 192 << 20,
    "cpu_limit_cores": 1.5,
}
CGROUPS: Final = "/sys/fs/cgroup"
CHANGES: Final = re.compile(
    r"stat|usage|current|peak|failcnt|procs$|tasks$|pressure|events|numa|io_service|io_wait|"
    r"io_merged|io_queued|time|sectors|memory_migrate|threads|control$|kmem.*slabinfo|freezer.state"
)
"""Names of files that count, or list, or cannot be read: their content is never the same twice."""
READS: Final = f"""
import json, os
found = {{}}
for place, _, names in os.walk("{CGROUPS}"):
    for name in names:
        try:
            with open(os.path.join(place, name)) as file:
                found[os.path.join(place, name)] = file.read(4096)
        except OSError as error:
            found[os.path.join(place, name)] = error.strerror
print(json.dumps(found))
"""
OWN_CGROUP: Final = "cat /proc/1/cgroup; echo; cat /proc/self/cgroup"
OWN_MOUNTS: Final = "grep -E ' - cgroup2? ' /proc/self/mountinfo"


def cgroup_files(container: Container) -> dict[str, str]:
    """Returns the content of each file below /sys/fs/cgroup, as a process of `exec` reads it."""
    found: dict[str, str] = json.loads(container.output(["python3", "-c", READS]))
    return found


def in_words(container: Container, text: str) -> str:
    """Returns the text without numbers of mounts and of this container."""
    text = text.replace(container.id, "CONTAINER").replace(container.pod.uid, "POD")
    return re.sub(r"(?m)^\d+ \d+ \d+:\d+ ", "", text)


def test_restored_container_sees_its_own_cgroups_file_by_file(swap_node: Node) -> None:
    taken = own_snapshot(swap_node, "cgroups", LIMITS)
    restored = start_victim(swap_node, "cgroups", LIMITS, taken.id)
    assert_restored(restored.container())
    cold = swap_node.kubelet.run_pod("cold", [own_spec("cgroups", **LIMITS)])
    first_answer(cold)
    assert_cold(cold.container())
    here, there = cgroup_files(cold.container()), cgroup_files(restored.container())
    assert there.keys() == here.keys()
    differing = {
        name: (text, there[name]) for name, text in here.items()
        if there[name] != text and not CHANGES.search(name)
    }  # fmt: skip
    assert differing == {}
    for command in (OWN_CGROUP, OWN_MOUNTS):
        of_cold, of_restored = (
            in_words(each.container(), each.container().output(["sh", "-c", command]))
            for each in (cold, restored)
        )
        assert of_restored == of_cold, command
        assert command != OWN_CGROUP or "CONTAINER" in of_restored
    limits = [
        name for name, text in there.items() if text.strip() in (str(192 << 20), "150000")
    ]  # fmt: skip
    assert len(limits) >= 2, f"memory and processor time are limited: {there}"
    used = next(
        name for name in there
        if name.endswith(("/memory.usage_in_bytes", "/memory.current"))
    )  # fmt: skip
    assert 0 < int(there[used]) <= 192 << 20


@pytest.mark.attack("a restored container reads the statistics of another pod")
def test_restored_container_reads_no_other_pods_statistics(swap_node: Node) -> None:
    other = swap_node.kubelet.run_pod("other", [own_spec("others")])
    first_answer(other)
    taken = own_snapshot(swap_node, "spies", {})
    pod = start_victim(swap_node, "spies", {}, taken.id)
    assert_restored(pod.container())
    foreign = {other.container().id, other.sandbox_id, pod.sandbox_id}
    seen = pod.container().output(["find", CGROUPS])
    assert [line for line in seen.splitlines() if any(each in line for each in foreign)] == []
    # A process that is not in the container's PID namespace has the number 0.
    listed = pod.container().output(["sh", "-c", f"find {CGROUPS} -name cgroup.procs | xargs cat"])
    assert listed.split(), "its own processes"
    assert "0" not in listed.split()
