"""A snapshot has the container's own objects of the pod's /dev/shm and IPC namespace."""

import os
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.node.attacking import own_spec
from tests.node.kubelet import Pod
from tests.node.node import Node
from tests.node.podspec import ContainerSpec, EmptyDir, VolumeMount
from tests.node.swapping import (
    SNAPSHOTS,
    ask,
    assert_restored,
    first_answer,
    probe,
    published,
    said,
    wipe_snapshots,
    wishes,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

MARK: Final = "the-neighbours-secret"
"""Joined together in the neighbour: no snapshot has the neighbour's arguments."""


@pytest.fixture(autouse=True, scope="module")
def no_snapshots_after_it(swap_node: Node) -> Iterator[None]:
    yield
    wipe_snapshots(swap_node)


NEIGHBOUR: Final = f"""
import ctypes, mmap, os, time
secret = "-".join({MARK.split("-")!r}).encode()
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
def made(number):
    assert number >= 0, os.strerror(ctypes.get_errno())
    return number
def file(name, size=1):
    fd = os.open(f"/dev/shm/{{name}}", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(fd, secret * size)
    return fd
os.close(file("early-and-closed"))
kept = [file("early"), file("early-and-big", 1 << 20)]
os.mkdir("/dev/shm/theirs")
os.close(file("theirs/below"))
for key in (0x51, 0x52):
    segment = made(libc.shmget(key, 1 << 20, 0o1600))
    address = libc.shmat(segment, None, 0)
    ctypes.memmove(address, secret, len(secret))
    if key == 0x52:
        libc.shmdt(ctypes.c_void_p(address))
made(libc.semget(0x53, 3, 0o1600))
queue = made(libc.msgget(0x54, 0o1600))
made(libc.msgsnd(queue, ctypes.create_string_buffer(b"\\1" + bytes(7) + secret), len(secret), 0))
print("armed", flush=True)
while not os.path.exists("/dev/shm/go-on"):
    time.sleep(0.01)
kept.append(file("late"))
mapped = mmap.mmap(kept[-1], len(secret))
os.close(kept.pop())
print("went on", flush=True)
time.sleep(1000)
"""
"""Objects of another container in /dev/shm and in the IPC namespace, also of the same names."""


def pair(case: str) -> list[ContainerSpec]:
    neighbour = probe(name="neighbour", command=["python3", "-c", NEIGHBOUR])
    return [neighbour, own_spec(case)]


def started(node: Node, case: str, name: str, annotations: dict[str, str]) -> Pod:
    """Starts the pod; its neighbour has made everything before `main` is created."""
    pod = node.kubelet.make_pod(name, pair(case), annotations=annotations)
    pod.run_sandbox()
    for each in ("neighbour", "main"):
        pod.container(each).create()
        pod.container(each).start()
        if each == "neighbour":
            pod.container(each).wait_log("armed")
    first_answer(pod)
    return pod


def of_main(**more: str) -> dict[str, str]:
    """Returns annotations by which only `main` opts in."""
    annotations = wishes(capture_when="signal", **more)
    annotations["quickthaw.io/snapshot.main"] = annotations.pop("quickthaw.io/snapshot")
    return annotations


def hold(pod: Pod, *, port: int = 8000, name: str = "own") -> None:
    """Have the probe keep a file open, and one mapped.

    None that is deleted: such a one is not made again beside another container.
    """
    ask(pod, f"/hold?name={name}&path=/dev/shm/{name}&size=9000&seed=1", port=port)
    ask(pod, f"/hold?name={name}-m&path=/dev/shm/{name}-m&size=9000&seed=2&map=1", port=port)


def held_is_right(pod: Pod, *, port: int = 8000) -> None:
    held = ask(pod, "/held", port=port)
    assert {name: each["ok"] for name, each in held.items()} == dict.fromkeys(held, True)
    assert len(held) == 2


def neighbours_names(pod: Pod) -> list[str]:
    """Returns the neighbour's own view of its objects."""
    code = """
import os
secret = b"-".join([b"the", b"neighbours", b"secret"])
for top, _, names in os.walk("/dev/shm"):
    for name in sorted(names):
        with open(f"{top}/{name}", "rb") as file:
            if file.read().startswith(secret):
                print(f"{top}/{name}"[9:])
"""
    return sorted(pod.container("neighbour").output(["python3", "-c", code]).split())


@pytest.mark.attack("a snapshot brings a neighbour's /dev/shm and System V objects to another pod")
def test_snapshot_has_no_object_of_a_neighbour(swap_node: Node) -> None:
    source = started(swap_node, "neighbour", "source", of_main())
    hold(source)
    source.container("neighbour").output(["touch", "/dev/shm/go-on"])
    source.container("neighbour").wait_log("went on")
    source.container("neighbour").output(["rm", "/dev/shm/go-on"])
    theirs = neighbours_names(source)
    assert theirs == ["early", "early-and-big", "early-and-closed", "late", "theirs/below"]
    ask(source, "/ready")
    taken = published(source)
    found = swap_node.call(["grep", "-rlaF", MARK, f"{SNAPSHOTS}/{taken}"])
    assert found.stdout == "", "their bytes are in the snapshot"
    listed = swap_node.run(["sh", "-c", f"cd {SNAPSHOTS}/{taken}/shm && find . -mindepth 1"])
    assert sorted(listed.split()) == ["./own", "./own-m"]
    held_is_right(source)
    source.remove(grace_s=0)
    victim = {"quickthaw.io/restore.main": f"sha256:{taken}"}
    pod = started(swap_node, "neighbour", "replica", victim)
    assert_restored(pod.container())
    held_is_right(pod)
    expected = ["early", "early-and-big", "early-and-closed", "theirs/below"]
    assert neighbours_names(pod) == expected, "they are as the neighbour has made them"


def test_two_containers_that_both_use_shm_are_captured_and_restored(swap_node: Node) -> None:
    specs = [
        probe(name="first", env={"CASE": "first of two"}),
        probe(name="second", env={"CASE": "second of two", "PORT": "8001"}),
    ]
    annotations = wishes(capture_when="signal")
    source = swap_node.kubelet.run_pod("source", specs, annotations=annotations)
    for port, name in ((8000, "first"), (8001, "second")):
        first_answer(source, port=port)
        hold(source, port=port, name=name)
    for port, name in ((8000, "first"), (8001, "second")):
        ask(source, "/ready", port=port)
        published(source, name)
        ask(source, "/append?name=second&text=more", port=8001)  # or else two would fit by chance
    source.remove(grace_s=0)
    pod = swap_node.kubelet.run_pod("replica", specs, annotations=annotations)
    for port, container in zip((8000, 8001), pod.containers.values(), strict=True):
        first_answer(pod, port=port)
        assert_restored(container)
        held_is_right(pod, port=port)


WHO_KNOWS: Final[dict[str, str]] = {
    "/dev/shm/whose": "/write?path=/dev/shm/whose&size=10",
    "/dev/shm/whose-directory": "/mkdir?path=/dev/shm/whose-directory",
}


@pytest.mark.parametrize("name", WHO_KNOWS)
def test_object_that_two_containers_can_have_made_is_refused_by_name(
    swap_node: Node, name: str
) -> None:
    source = started(swap_node, f"whose {name}", "source", of_main())
    ask(source, WHO_KNOWS[name])
    ask(source, "/ready")
    line = said(swap_node, source.container().id[:12], "no snapshot was made", within_s=30)
    assert f"nobody can tell whether this or another container of the pod made {name}" in line
    assert neighbours_names(source), "and nothing happened to either"


def test_neighbours_file_that_both_have_open_is_refused_by_name(swap_node: Node) -> None:
    source = started(swap_node, "in both", "source", of_main())
    ask(source, "/hold?name=theirs&path=/dev/shm/early&size=10&seed=1")
    ask(source, "/ready")
    line = said(swap_node, source.container().id[:12], "no snapshot was made", within_s=30)
    assert "/dev/shm/early is in use in this container, and is in use in another one" in line


def closed(pod: Pod) -> None:
    """Objects that only this container can have made come along though nobody has them open."""
    ask(pod, "/write?path=/dev/shm/sem.named&size=32&seed=1")
    ask(pod, "/mkdir?path=/dev/shm/empty")


def test_object_made_before_other_containers_came_is_captured(swap_node: Node) -> None:
    fields: dict[str, Any] = {"name": "later", "env": {"PORT": "8001"}}
    annotations = of_main()
    pod = swap_node.kubelet.make_pod(
        "source", [own_spec("made alone"), probe(**fields)], annotations=annotations
    )
    pod.run_sandbox()
    pod.container().create()
    pod.container().start()
    first_answer(pod)
    closed(pod)
    pod.container("later").create()
    pod.container("later").start()
    first_answer(pod, port=8001)
    ask(pod, "/ready")
    taken = published(pod)
    pod.remove(grace_s=0)
    replica = swap_node.kubelet.run_pod(
        "replica", [own_spec("made alone")], annotations={"quickthaw.io/restore": f"sha256:{taken}"}
    )
    first_answer(replica)
    assert_restored(replica.container())
    assert ask(replica, "/read?path=/dev/shm")["entries"] == ["empty", "sem.named"]


def test_container_that_came_and_went_while_daemon_was_down_is_known(swap_node: Node) -> None:
    specs = [own_spec("away"), probe(name="later", command=["true"])]
    pod = swap_node.kubelet.make_pod("source", specs, annotations=of_main())
    pod.run_sandbox()
    pod.container().create()
    pod.container().start()
    first_answer(pod)
    with swap_node.daemon_stopped():
        pod.container("later").create()
        pod.container("later").start()
        pod.container("later").wait_exit()
    ask(pod, "/write?path=/dev/shm/whose&size=10")
    ask(pod, "/ready")
    line = said(swap_node, pod.container().id[:12], "no snapshot was made", within_s=30)
    assert "another container of the pod made /dev/shm/whose" in line


HIDES: Final = f"""
import ctypes, os, time
secret = "-".join({MARK.split("-")!r}).encode()
while not os.path.exists("/dev/shm/go-on"):
    time.sleep(0.01)
fd = os.open("/dev/shm/whose", os.O_RDWR | os.O_CREAT, 0o666)
os.write(fd, secret)
libc = ctypes.CDLL(None, use_errno=True)
IPC, MOUNTS = 0x08000000, 0x00020000
assert libc.unshare(IPC | MOUNTS) == 0, os.strerror(ctypes.get_errno())
assert libc.mount(None, b"/", None, 0x4000 | 0x40000, None) == 0  # private, all of them
assert libc.umount2(b"/dev/shm", 2) == 0, os.strerror(ctypes.get_errno())
print("armed", flush=True)
time.sleep(1000)
"""
"""A neighbour that leaves the pod's IPC namespace, and unmounts its /dev/shm, with a file open."""


@pytest.mark.attack("a neighbour hides in namespaces of its own, and its open file is captured")
def test_neighbour_in_namespaces_of_its_own_still_holds_its_files(swap_node: Node) -> None:
    neighbour = probe(
        name="neighbour", command=["python3", "-c", HIDES], add_capabilities=["SYS_ADMIN"],
        seccomp="Unconfined",
    )  # fmt: skip
    pod = swap_node.kubelet.make_pod(
        "source", [neighbour, own_spec("hides")], annotations=of_main()
    )
    pod.run_sandbox()
    for each in ("neighbour", "main"):
        pod.container(each).create()
        pod.container(each).start()
    first_answer(pod)
    pod.container("neighbour").output(["touch", "/dev/shm/go-on"])
    pod.container("neighbour").wait_log("armed")
    pod.container("main").output(["rm", "/dev/shm/go-on"])
    spaces = {os.readlink(f"/proc/{each.host_pid}/ns/ipc") for each in pod.containers.values()}
    assert len(spaces) == 2, "it has left"
    ask(pod, "/hold?name=both&path=/dev/shm/whose&size=10&seed=1")
    ask(pod, "/ready")
    line = said(swap_node, pod.container().id[:12], "no snapshot was made", within_s=30)
    assert "/dev/shm/whose is in use in this container, and is in use in another one" in line


def test_pod_in_the_nodes_ipc_namespace_has_the_nodes_shm_and_is_not_captured(
    swap_node: Node,
) -> None:
    pod = swap_node.kubelet.run_pod(
        "source", [own_spec("host ipc")], annotations=wishes(), host_ipc=True
    )
    first_answer(pod)
    line = said(swap_node, pod.container().id[:12], "no snapshot was made", within_s=30)
    assert "its /dev/shm is the host's" in line


OF_THE_NODE: Final = f"""
import ctypes
secret = "-".join({MARK.split("-")!r}).encode()
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
segment = libc.shmget(0x71, 1 << 16, 0o1600)
assert segment >= 0
ctypes.memmove(libc.shmat(segment, None, 0), secret, len(secret))
"""


@pytest.mark.attack("a pod with hostIPC brings the node's System V objects to another pod")
def test_snapshot_of_a_pod_in_the_nodes_ipc_namespace_has_nothing_of_the_node(
    swap_node: Node,
) -> None:
    """With an emptyDir as its /dev/shm."""
    shm = VolumeMount("/dev/shm", EmptyDir("shm", in_memory=True))
    swap_node.run(["python3", "-c", OF_THE_NODE])
    try:
        pod = swap_node.kubelet.run_pod(
            "source", [own_spec("host ipc, own shm", mounts=[shm])], annotations=of_main(),
            host_ipc=True,
        )  # fmt: skip
        first_answer(pod)
        ask(pod, "/ready")
        taken = published(pod)
    finally:
        swap_node.run(["ipcrm", "-M", "0x71"])
    found = swap_node.call(["grep", "-rlaF", MARK, f"{SNAPSHOTS}/{taken}"])
    assert found.stdout == "", "the node's bytes are in the snapshot"
