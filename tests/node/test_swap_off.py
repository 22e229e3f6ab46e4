"""Where nothing may be swapped, or nothing can be: containers are as they would be without us.

Pods that did not opt in, a daemon that is away or was killed, and bad input.
"""

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos import cri_pb2 as pb
from shim.contract.manifest import SCHEMA
from tests.node.kubelet import Pod
from tests.node.node import Node
from tests.node.podspec import ContainerSpec
from tests.node.swapping import (
    RESTORE,
    RUN,
    SnapshotRef,
    ask,
    assert_cold,
    assert_restored,
    captured,
    first_answer,
    lines_about,
    probe,
    published,
    restore_log,
    restored,
    said,
    wait_until,
    wipe_snapshots,
    wishes,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

HANGS_AT_MOST_S = 10
"""containerd waits 2 s for an answer, once, and then closes the connection."""
STAGING = "/var/lib/quickthaw/staging"
BUNDLES = "/run/containerd/io.containerd.runtime.v2.task/k8s.io"


@pytest.fixture(autouse=True, scope="module")
def no_snapshots_after_it(swap_node: Node) -> Iterator[None]:
    yield
    wipe_snapshots(swap_node)


def own_spec(case: str, **fields: Any) -> ContainerSpec:
    """Returns a probe that no other case's snapshot fits."""
    return probe(env={"CASE": case}, **fields)


def own_snapshot(node: Node, case: str) -> SnapshotRef:
    """Returns a snapshot for `own_spec(case)` alone, which a test may damage. Its source is
    gone.
    """
    taken = captured(node, own_spec(case))
    taken.source.remove(grace_s=0)
    return taken


@pytest.fixture(scope="module")
def shared(swap_node: Node) -> SnapshotRef:
    """Returns a snapshot for the tests that do not change it."""
    return own_snapshot(swap_node, "shared")


def start_pod(node: Node, case: str, **more: str) -> Pod:
    """Starts a pod that may only be restored, and is ready."""
    annotations = RESTORE | {f"quickthaw.io/{name}": value for name, value in more.items()}
    pod = node.kubelet.run_pod("replica", [own_spec(case)], annotations=annotations)
    first_answer(pod)
    return pod


def left_of(node: Node, container: str) -> list[str]:
    """Returns the files in /run/quickthaw about a container, except the outcome of its swap."""
    found = node.run(["find", RUN, "-name", f"*{container}*"]).split()
    return [path for path in found if "/outcomes/" not in path]


# Pods that did not opt in


def given_specs(node: Node) -> dict[str, bytes]:
    """Returns config.json of a pod's sandbox and container, without fields that differ from pod to
    pod.
    """
    with node.kubelet.run_pod("plain", [probe(memory_limit_bytes=256 << 20)]) as pod:
        container = pod.container()
        own = {pod.sandbox_id: b"SANDBOX", container.id: b"CONTAINER", pod.uid: b"UID"}
        specs = {}
        for name, bundle in (("sandbox", pod.sandbox_id), ("container", container.id)):
            spec = node.path(f"{BUNDLES}/{bundle}/config.json").read_bytes()
            for value, placeholder in own.items():
                spec = spec.replace(value.encode(), placeholder)
            spec = re.sub(rb"/proc/\d+/ns/", b"/proc/PID/ns/", spec)
            spec = re.sub(rb"/netns/cni-[0-9a-f-]+", b"/netns/cni-NAME", spec)
            specs[name] = re.sub(rb"/containers/main/[0-9a-f]{8}", b"/containers/main/LOG", spec)
        return specs


@contextlib.contextmanager
def plain_runc(node: Node) -> Iterator[None]:
    """Lets containerd call runc itself, without a daemon, inside of the `with`."""
    with node.daemon_stopped():
        node.containerd.swapping = False
        node.restart_containerd()
        try:
            yield
        finally:
            node.containerd.swapping = True
            node.restart_containerd()


def test_pod_without_annotations_is_the_same_as_without_quickthaw(swap_node: Node) -> None:
    ours = given_specs(swap_node)
    with plain_runc(swap_node):
        plain = given_specs(swap_node)
    assert ours == plain


def test_container_with_a_terminal_is_not_captured(swap_node: Node) -> None:
    spec = own_spec("terminal", tty=True, stdin=True)
    pod = swap_node.kubelet.run_pod("source", [spec], annotations=wishes())
    said(swap_node, pod.container().id[:12], "it has a terminal", "goes on serving")
    assert first_answer(pod)["nonce"]


# The daemon is away


def test_pods_start_cold_while_the_daemon_is_down(swap_node: Node) -> None:
    with swap_node.daemon_stopped():
        pod = swap_node.kubelet.run_pod("early", [own_spec("early")], annotations=wishes())
        assert_cold(pod.container())
        nonce = first_answer(pod)["nonce"]
    said(swap_node, pod.container().id[:12], "quickthawd was away", "goes on serving")
    assert ask(pod, "/state")["nonce"] == nonce


def test_hanging_daemon_delays_no_pod_for_long(swap_node: Node, shared: SnapshotRef) -> None:
    os.kill(swap_node.daemon_pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        pod = start_pod(swap_node, "shared")
        assert time.monotonic() - began < HANGS_AT_MOST_S
        assert_cold(pod.container())
    finally:
        os.kill(swap_node.daemon_pid, signal.SIGCONT)
    said(swap_node, "synchronized with 1 pods")
    pod.remove(grace_s=0)
    again = start_pod(swap_node, "shared")
    assert_restored(again.container())


def test_ticket_outlives_the_daemon_and_poststop_needs_no_daemon(swap_node: Node) -> None:
    taken = own_snapshot(swap_node, "ticket")
    pod = swap_node.kubelet.make_pod("replica", [own_spec("ticket")], annotations=RESTORE)
    pod.run_sandbox()
    container = pod.container()
    container.create()
    try:
        swap_node.kill_daemon()
        assert left_of(swap_node, container.id)
        container.start()
        assert first_answer(pod)["nonce"] == taken.nonce
        pod.remove(grace_s=0)
        assert left_of(swap_node, container.id) == []
    finally:
        swap_node.start_daemon()


def test_restarted_daemon_captures_containers_that_were_waiting(swap_node: Node) -> None:
    annotations = wishes(capture_when="signal")
    pod = swap_node.kubelet.run_pod("source", [own_spec("waits")], annotations=annotations)
    nonce = first_answer(pod)["nonce"]
    swap_node.kill_daemon()
    swap_node.start_daemon()
    assert ask(pod, "/ready")["told"]
    published(pod)
    replica = restored(swap_node, own_spec("waits"), annotations=annotations)
    assert first_answer(replica)["nonce"] == nonce


@pytest.mark.parametrize("when", ["dump.log", "pages-1.img"])
def test_daemon_killed_during_a_capture_leaves_no_container_frozen(
    swap_node: Node, when: str
) -> None:
    annotations = wishes(capture_when="signal")
    pod = swap_node.kubelet.run_pod("source", [own_spec(when)], annotations=annotations)
    nonce = first_answer(pod)["nonce"]
    ask(pod, "/allocate?mib=200")
    ask(pod, "/ready")
    private = swap_node.path(f"{RUN}/containers/{pod.container().id}")
    seen = {
        "dump.log": lambda: (private / "work" / "dump.log").exists(),
        "pages-1.img": lambda: list(swap_node.path(STAGING).glob("*/criu/pages-1.img")),
    }
    wait_until(seen[when], f"there is no {when}", swap_node, every_s=0.001)
    swap_node.kill_daemon()
    swap_node.start_daemon()
    assert first_answer(pod)["nonce"] == nonce
    published(pod)
    assert ask(pod, "/state")["nonce"] == nonce
    assert os.listdir(swap_node.path(STAGING)) == []


def test_restarted_daemon_knows_restored_containers(swap_node: Node) -> None:
    taken = own_snapshot(swap_node, "known")
    pod = start_pod(swap_node, "known")
    swap_node.kill_daemon()
    swap_node.start_daemon()
    assert ask(pod, "/state")["nonce"] == taken.nonce
    assert_restored(pod.container())
    assert pod.container().stop(grace_s=10).exit_code == 0


def test_killed_swap_is_a_failed_start_without_left_overs(
    swap_node: Node, shared: SnapshotRef
) -> None:
    pod = swap_node.kubelet.make_pod("replica", [own_spec("shared")], annotations=RESTORE)
    pod.run_sandbox()
    container = pod.container()
    container.create()
    log = restore_log(container)
    with ThreadPoolExecutor(1) as thread:
        starting = thread.submit(container.start)
        wait_until(log.exists, "CRIU does not run", swap_node, every_s=0.001)
        for pid in swapping_pids(container.id):
            with contextlib.suppress(ProcessLookupError):  # ended, because another start was killed
                os.kill(pid, signal.SIGKILL)
        with pytest.raises(grpc.RpcError):
            starting.result()
    container.restart()
    assert first_answer(pod)["nonce"] != shared.nonce
    assert_cold(container)


def swapping_pids(container: str) -> list[int]:
    """Returns the processes of `quickthaw-runc create` for the container."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = path.read_bytes().decode(errors="replace").split("\0")
            if (
                "create" in command
                and container in command
                and any(word.endswith("front.py") for word in command)
            ):
                found.append(int(path.parent.name))
    return found


# Bad input


@pytest.mark.parametrize(
    ("annotations", "parts"),
    [
        ({"snapshot": "No Name"}, ("quickthaw.io/snapshot: 'No Name'", "Write auto, or a name")),
        ({"snapshot": "auto", "capture-when": "soon"}, ("capture-when: 'soon'", "not a condition")),
        ({"snapshott": "auto"}, ("no such annotation", "Did you mean quickthaw.io/snapshot?")),
        ({"restore": "no-such-one"}, ("there is no snapshot 'no-such-one'",)),
        ({"restore": "sha256:0123456789ab"}, ("sha256:0123456789ab", "none has this id or name")),
    ],
)
def test_malformed_annotation_is_a_cold_start_and_reported(
    swap_node: Node, annotations: dict[str, str], parts: tuple[str, ...]
) -> None:
    before = len(swap_node.journal())
    chosen = {f"quickthaw.io/{name}": value for name, value in annotations.items()}
    pod = swap_node.kubelet.run_pod("wrong", [probe()], annotations=chosen)
    assert_cold(pod.container())
    first_answer(pod)
    line = said(swap_node, "default/wrong", *parts)
    assert "cold" in line
    new = swap_node.journal()[before:].splitlines()
    assert [each for each in new if "default/wrong" in each] == [line]


def truncate(image: Path) -> None:
    """Cuts the file to half of its size."""
    os.truncate(image, image.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "image"), [(truncate, "pages-1.img"), (os.unlink, "pages-1.img")]
)
def test_damaged_criu_image_is_a_cold_start(
    swap_node: Node, damage: Callable[[Path], None], image: str
) -> None:
    case = f"{damage.__name__}-{image}"
    taken = own_snapshot(swap_node, case)
    damage(taken.directory / "criu" / image)
    before = sorted(taken.directory.rglob("*"))
    pod = start_pod(swap_node, case)
    assert_cold(pod.container())
    assert ask(pod, "/state")["nonce"] != taken.nonce
    line = said(swap_node, pod.container().id[:12], image, "the container starts cold")
    said(swap_node, f"snapshot {taken.id[:12]} goes to quarantine: it is damaged")
    told = lines_about(swap_node, pod.container())
    assert len(told) == 3, "the decision, why it failed, and that the snapshot is used no more"
    assert "WARNING" in line
    assert sorted(taken.directory.rglob("*")) == before


def test_manifest_of_a_newer_schema_is_a_cold_start(swap_node: Node) -> None:
    taken = own_snapshot(swap_node, "newer")
    manifest = taken.directory / "manifest.json"
    known, following = rf'"schema": ?{SCHEMA}\b', f'"schema":{SCHEMA + 1}'
    newer = re.sub(known, following, manifest.read_text(), count=1)
    assert newer != manifest.read_text()
    with swap_node.daemon_stopped():
        manifest.write_text(newer)
    line = said(swap_node, "WARNING", taken.id[:12], "schema")
    pod = start_pod(swap_node, "newer")
    assert_cold(pod.container())
    assert manifest.read_text() == newer
    assert swap_node.journal().splitlines().count(line) == 1


@pytest.mark.parametrize("content", ["", '{"schema": 9}'])
def test_corrupted_ticket_is_a_cold_start(
    swap_node: Node, content: str, shared: SnapshotRef
) -> None:
    pod = swap_node.kubelet.make_pod("replica", [own_spec("shared")], annotations=RESTORE)
    pod.run_sandbox()
    container = pod.container()
    container.create()
    ticket = swap_node.path(f"{RUN}/tickets/{container.id}.json")
    ticket.write_text(content)
    container.start()
    assert first_answer(pod)["nonce"] != shared.nonce
    assert_cold(container)
    said(swap_node, container.id[:12], "cannot read the ticket", "starts cold")


def test_swap_beyond_its_deadline_is_a_cold_start(swap_node: Node, shared: SnapshotRef) -> None:
    pod = start_pod(swap_node, "shared", deadline="0.01s")
    assert_cold(pod.container())
    assert ask(pod, "/state")["nonce"] != shared.nonce
    said(swap_node, pod.container().id[:12], "deadline passed", "starts cold")


def test_pod_that_forbids_cold_starts_fails_visibly(swap_node: Node) -> None:
    taken = own_snapshot(swap_node, "fail")
    (taken.directory / "criu" / "pages-1.img").unlink()
    annotations = {**RESTORE, "quickthaw.io/fallback": "fail"}
    pod = swap_node.kubelet.make_pod("replica", [own_spec("fail")], annotations=annotations)
    pod.run_sandbox()
    container = pod.container()
    container.create()
    with pytest.raises(grpc.RpcError) as refused:
        container.start()
    assert "pages-1.img" in str(refused.value)
    assert "the container does not start" in str(refused.value), "the effect is said as it is"
    ended = container.status()
    assert ended.state == pb.CONTAINER_EXITED
    assert "pages-1.img" in ended.message
