"""Failures of a restore that the pod or its author causes do not count against the snapshot."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import pytest

from shim.contract.paths import CONTAINER_WORK
from tests.node import hanging
from tests.node.attacking import SHARED, run_helper, shared_directory
from tests.node.kubelet import Pod
from tests.node.node import Node
from tests.node.podspec import ContainerSpec, HostPath, VolumeMount
from tests.node.swapping import (
    QUICKTHAW,
    RESTORE,
    RUN,
    SAID_WITHIN_S,
    STORE,
    SnapshotRef,
    ask,
    assert_restored,
    captured,
    first_answer,
    is_restored,
    probe,
    said,
    wait_until,
    wipe_snapshots,
    wishes,
)
from tests.node.test_limits import configured, criu_after

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture(autouse=True, scope="module")
def no_snapshots_after_it(swap_node: Node) -> Iterator[None]:
    with shared_directory(swap_node):
        yield
    wipe_snapshots(swap_node)


def victim_spec(case: str) -> ContainerSpec:
    mounts = [VolumeMount("/own", HostPath(f"{SHARED}/own"))]
    return probe(env={"CASE": f"blame-{case}"}, mounts=mounts)


def victims_snapshot(node: Node, case: str, *, make: bool = True) -> SnapshotRef:
    """Returns the snapshot of a container with an open file in its volume, and another in
    /dev/shm. make: else the volume with its file is there.
    """
    if make:
        own = f"{SHARED}/own"
        node.run(["sh", "-c", f"rm -rf {own} && mkdir {own} && chmod 777 {own}"])

    def prepare(pod: Pod) -> None:
        if make:
            ask(pod, "/write?path=/own/file&size=4096&seed=1")
        ask(pod, "/write?path=/dev/shm/buffer&size=4096&seed=1")
        run_helper(pod.container(), KEEPS_OPEN)
        wait_until(
            lambda: "opened" in ask(pod, "/read?path=/tmp")["entries"], "nothing is open", node
        )
        ask(pod, "/ready")

    taken = captured(
        node, victim_spec(case), annotations=wishes(capture_when="signal"), before=prepare
    )
    taken.source.remove(grace_s=0)
    return taken


KEEPS_OPEN: Final = """
file = os.open("/own/file", os.O_RDWR)
os.close(os.open("/tmp/opened", os.O_CREAT | os.O_WRONLY))
time.sleep(3600)
"""


def nothing(_pod: Pod) -> None:
    """Does nothing: the annotations are enough."""


def left_over(pod: Pod) -> None:
    pod.container("side").output(["sh", "-c", "echo other > /dev/shm/buffer"])


def volume_changed(pod: Pod) -> None:
    pod.node.path(f"{SHARED}/own/file").unlink()


def port_taken(pod: Pod) -> None:
    pod.container("side").wait_log("ready ")


CAUSES: Final[dict[str, tuple[dict[str, str], int, Callable[[Pod], None], str]]] = {
    "resume": ({"quickthaw.io/resume": "exec:false"}, 8005, nothing, "the resume call failed"),
    "late resume": (
        {"quickthaw.io/resume": "exec:sleep 60", "quickthaw.io/deadline": "11s"}, 8005, nothing,
        "the resume call failed",
    ),
    "shm": ({}, 8005, left_over, "buffer exists with"),
    "volume": ({}, 8005, volume_changed, "own/file"),
    "port": ({}, 8000, port_taken, "the container starts cold"),
}  # fmt: skip
"""An author's ways to make a restore fail: annotations, the port of a sidecar, an action, and the
words of the report.
"""


@pytest.mark.attack(
    "two pods that fail by their own doing put the snapshot of others in quarantine"
)
@pytest.mark.parametrize("case", CAUSES)
def test_failure_that_the_pod_causes_does_not_blame_the_snapshot(
    swap_node: Node, case: str
) -> None:
    taken = victims_snapshot(swap_node, case)
    annotations, port, cause, told = CAUSES[case]
    side = probe(name="side", env={"PORT": str(port)})
    spec = victim_spec(case)
    for number in range(3):
        own = {f"{name}.main": value for name, value in ({**RESTORE, **annotations}).items()}
        pod = swap_node.kubelet.make_pod(f"own-{number}", [side, spec], annotations=own)
        pod.run_sandbox()
        for name in ("side", "main"):
            pod.container(name).create()
            if name == "main":
                cause(pod)
            pod.container(name).start()
        said(swap_node, pod.container().id[:12], told)
        if case == "port":  # it ends by itself: a removal at that moment fails in containerd
            pod.container().wait_exit()
        pod.remove(grace_s=0)
        ask_again(swap_node, case)
    assert not swap_node.path(f"{STORE}/health/{taken.id}.json").exists(), "nothing is counted"
    assert taken.id not in {row["id"] for row in quarantined(swap_node)}
    swap_node.path(f"{RUN}/logs/{taken.id}.log").unlink(missing_ok=True)  # CRIU's, for people
    pod = swap_node.kubelet.run_pod("innocent", [spec], annotations=RESTORE)
    first_answer(pod)
    assert_restored(pod.container())


CUT_OFF: Final = f"""
import glob, os, socket, struct
for path in glob.glob("{RUN}/containers/*/{CONTAINER_WORK}/lazy-pages.socket"):
    os.chdir(os.path.dirname(path))  # the path is too long for an address
    with socket.socket(socket.AF_UNIX) as criu:
        criu.connect("lazy-pages.socket")
        criu.send(struct.pack("<i", 1){{}})
    open("/run/was-cut-off", "w").close()
"""
"""Sends the page server a part of CRIU's message, as a CRIU that ends in the middle of it."""


@pytest.mark.attack("a pod makes CRIU fail, and the report names the page server instead")
@pytest.mark.parametrize("part", ["", "[:2]", "[:0]"], ids=["pid", "half-a-pid", "nothing"])
def test_criu_that_ends_inside_a_message_to_the_page_server_is_the_cause(
    swap_node: Node, part: str
) -> None:
    """CRIU kills its processes after its error, and a process may be about to send its memory."""
    case = f"cut-off{part}"
    victims_snapshot(swap_node, case)
    swap_node.write("/run/cut-off.py", CUT_OFF.format(part))
    pod = swap_node.kubelet.make_pod("own-0", [victim_spec(case)], annotations=RESTORE)
    pod.run_sandbox()
    pod.container().create()  # another CRIU than at the capture would have another key
    volume_changed(pod)
    with criu_after(swap_node, "python3 -I /run/cut-off.py"):
        pod.container().start()
    first_answer(pod)
    told = said(swap_node, pod.container().id[:12], "the container starts cold")
    swap_node.path("/run/cut-off.py").unlink()
    swap_node.path("/run/was-cut-off").unlink()
    assert "cannot restore the process tree" in told
    assert "Can't open file own/file" in told
    assert not is_restored(pod.container())
    wipe_snapshots(swap_node)


def ask_again(node: Node, case: str) -> None:
    """Gives the volume its state of the capture."""
    if case == "volume":
        node.path(f"{SHARED}/own/file").write_bytes(bytes(4096))


def quarantined(node: Node) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(
        node.run([QUICKTHAW, "quarantine", "ls", "--json"])
    )["quarantined"]  # fmt: skip
    return rows


def test_pod_that_fails_repeatedly_counts_once(swap_node: Node) -> None:
    """A container that kubelet restarts tries the same snapshot in the same pod."""
    from tests.node.pageserver import armed

    taken = victims_snapshot(swap_node, "restarts")
    counted = swap_node.path(f"{STORE}/health/{taken.id}.json")
    annotations = {**RESTORE, "quickthaw.io/on-restart": "restore"}
    with armed(swap_node, "restore.criu.called", "error"):
        pod = swap_node.kubelet.run_pod("one", [victim_spec("restarts")], annotations=annotations)
        first_answer(pod)
        for _ in range(2):
            pod.container().stop(grace_s=0)
            pod.container().restart()
            first_answer(pod)
            said(swap_node, pod.container().id[:12], "starts cold")
        wait_until(counted.exists, "it is counted", swap_node, within_s=SAID_WITHIN_S)
        assert json.loads(counted.read_text())["failures"] == 1
        assert quarantined(swap_node) == []
        other = swap_node.kubelet.run_pod("other", [victim_spec("restarts")], annotations=RESTORE)
        first_answer(other)
        said(swap_node, taken.id[:12], "goes to quarantine", "2 restores failed in a row")


HANGS: Final = "/run/hangs"


@pytest.mark.attack("two pods whose volume's server hangs put the snapshot of others in quarantine")
def test_volume_that_hangs_does_not_blame_the_snapshot(swap_node: Node) -> None:
    """The server does not answer CRIU until the restore has been given up."""
    swap_node.run(["mkdir", "-p", f"{SHARED}/own"])
    with (
        hanging.volume(swap_node, f"{SHARED}/own", HANGS),
        configured(swap_node, restore_hold_s=3.0),
    ):
        taken = victims_snapshot(swap_node, "hangs", make=False)
        for number in range(3):
            pod = swap_node.kubelet.make_pod(
                f"own-{number}", [victim_spec("hangs")], annotations=RESTORE
            )
            pod.run_sandbox()
            pod.container().create()
            swap_node.write(HANGS, "criu")
            with ThreadPoolExecutor(1) as thread:
                started = thread.submit(pod.container().start)
                time.sleep(4.0)
                swap_node.path(HANGS).unlink()
                started.result()
            line = said(swap_node, pod.container().id[:12], "starts cold")
            assert "deadline passed in step criu" in line
            assert taken.id not in {row["id"] for row in quarantined(swap_node)}
            assert not swap_node.path(f"{STORE}/health/{taken.id}.json").exists(), line
            assert "waits for a file system" in line
            pod.remove(grace_s=0)
        pod = swap_node.kubelet.run_pod("innocent", [victim_spec("hangs")], annotations=RESTORE)
        first_answer(pod)
        assert_restored(pod.container())
        pod.remove(grace_s=0)
