"""Containers whose device memory goes around the driver; with a stand-in for the CUDA driver."""

import ast
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.node.gpus import SHARED_MEMORY, checked, gpu_probe, in_use, octets, uuid
from tests.node.kubelet import Pod
from tests.node.node import Node
from tests.node.podspec import ContainerSpec
from tests.node.swapping import (
    SNAPSHOTS,
    SnapshotRef,
    ask,
    captured,
    first_answer,
    nothing_left,
    restored,
    said,
    wishes,
)

DIRECT = wishes(gpu="direct")
MIB = 24
"""Of each process on each device: from 8 MiB on the library takes it."""
ROOMY_MIB, PYTHON_MIB, HOST_MIB = 256, 60, 600
SOME_ANSWERS = 10
QUICK_S = 3.0
"""A driver's restore changes the address space thousands of times. It waited for the page server
each time, 10 s in all on an H200, as long as that held the userfaultfds.
"""


@pytest.fixture(autouse=True)
def _nothing_stays(gpu_node: Node) -> Iterator[None]:
    """Neither on the node nor on its GPUs."""
    with nothing_left(gpu_node):
        yield
    assert set(in_use(gpu_node).values()) == {0}


def direct_probe(*minors: int, env: dict[str, str]) -> ContainerSpec:
    return gpu_probe(*minors, env={"MIB": str(MIB), **env})


def taken_and_gone(node: Node, spec: ContainerSpec) -> tuple[SnapshotRef, dict[str, Any]]:
    """A snapshot of the way direct, and what its source, which survived, told of its GPUs."""
    taken = captured(node, spec, annotations=DIRECT, before=checked)
    there = checked(taken.source) | {"nonce": ask(taken.source, "/state")["nonce"]}
    taken.source.remove(grace_s=0)
    assert payload_bytes(taken) == len(there["processes"]) * MIB << 20
    return taken, there


def steps(node: Node) -> dict[str, float]:
    """Seconds of the steps of the last restore, as the journal has them."""
    line = [line for line in node.journal().splitlines() if "restored from" in line][-1]
    found: dict[str, float] = ast.literal_eval(line[line.index("{") :])
    return found


def payload_bytes(taken: SnapshotRef) -> int:
    """Of device memory in the snapshot's files."""
    return sum(path.stat().st_size for path in (taken.directory / "memory").glob("gpu*.data"))


def test_device_memory_goes_around_the_driver_and_comes_back(gpu_node: Node) -> None:
    spec = direct_probe(0, env={"CASE": "direct"})
    _, there = taken_and_gone(gpu_node, spec)
    for name in ("first", "second"):  # the second one with marks: nothing is hashed again
        replica = restored(gpu_node, spec, annotations=DIRECT, name=name)
        assert first_answer(replica)["nonce"] == there["nonce"]
        assert checked(replica)["processes"] == there["processes"]
        assert in_use(gpu_node)[0] > MIB << 20
        assert steps(gpu_node)["gpu"] < QUICK_S
        replica.remove(grace_s=0)


def test_it_goes_to_another_gpu(gpu_node: Node) -> None:
    spec = direct_probe(0, env={"CASE": "direct other", "NVIDIA_VISIBLE_DEVICES": uuid(0)})
    _, there = taken_and_gone(gpu_node, spec)
    other = direct_probe(1, env={"CASE": "direct other", "NVIDIA_VISIBLE_DEVICES": uuid(1)})
    replica = restored(gpu_node, other, annotations=DIRECT)
    assert first_answer(replica)["nonce"] == there["nonce"]
    assert checked(replica)["processes"][0]["uuids"] == [octets(1)]
    assert in_use(gpu_node)[0] == 0


def test_several_processes_on_several_gpus(gpu_node: Node) -> None:
    spec = direct_probe(0, 1, env={"CASE": "direct many", "CHILDREN": "2", **SHARED_MEMORY})
    _, there = taken_and_gone(gpu_node, spec)
    replica = restored(gpu_node, spec, annotations=DIRECT)
    assert first_answer(replica)["nonce"] == there["nonce"]
    assert checked(replica)["processes"] == there["processes"]


def test_a_restored_container_is_captured_again(gpu_node: Node) -> None:
    spec = direct_probe(0, env={"CASE": "direct again"})
    taken_and_gone(gpu_node, spec)
    replica = restored(gpu_node, spec, annotations=DIRECT)
    first_answer(replica)
    gpu_node.run(["quickthaw", "capture", replica.spec.name])
    there = checked(replica) | {"nonce": ask(replica, "/state")["nonce"]}
    replica.remove(grace_s=0)
    again = restored(gpu_node, spec, annotations=DIRECT, name="second")
    assert first_answer(again)["nonce"] == there["nonce"]
    assert checked(again)["processes"] == there["processes"]


def test_what_leaves_the_process_needs_no_room_in_its_memory_limit(gpu_node: Node) -> None:
    limit = 2 * ROOMY_MIB + PYTHON_MIB  # device memory of the stand-in is memory of the container
    env = {"CASE": "direct limit", "MIB": str(ROOMY_MIB)}
    spec = gpu_probe(0, env=env, memory_limit_bytes=limit << 20)
    taken = captured(gpu_node, spec, annotations=DIRECT, before=checked)
    checked(taken.source)
    assert payload_bytes(taken) == ROOMY_MIB << 20


def stop_of(pod: Pod, capture: Callable[[], object]) -> tuple[float, int]:
    """The longest wait of a request that is repeated without pause while `capture` runs, and how
    many requests were answered.
    """
    waits: list[float] = []
    ending = threading.Event()

    def work() -> None:
        while not ending.is_set():
            began = time.monotonic()
            ask(pod, "/state")
            waits.append(time.monotonic() - began)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        capture()
    finally:
        ending.set()
        thread.join()
    return max(waits), len(waits)


def test_the_source_serves_while_its_host_memory_is_copied(gpu_node: Node) -> None:
    """The GPU stands still from the end of the pre-copy on alone."""
    spec = direct_probe(0, env={"CASE": "direct precopy"})
    pod = gpu_node.kubelet.run_pod(
        "source", [spec], annotations=wishes(capture_when="signal", gpu="direct")
    )
    first_answer(pod)
    ask(pod, f"/allocate?mib={HOST_MIB}")

    def capture() -> None:
        ask(pod, "/ready")
        said(gpu_node, f"({pod.container().id[:12]}) captured as ", within_s=60)

    longest, answered = stop_of(pod, capture)
    timings = manifest_of(gpu_node, pod)["timings"]
    print(f"longest wait {longest:.3f} s, {answered} answers", timings)
    assert timings["memory_at"] + timings["memory"] <= timings["gpu_stopped_at"]
    assert answered > SOME_ANSWERS
    checked(pod)


def manifest_of(node: Node, pod: Pod) -> dict[str, Any]:
    """The manifest of the snapshot that was made of the pod."""
    for path in node.path(SNAPSHOTS).iterdir():
        manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text())
        if manifest["source"]["container_id"] == pod.container().id:
            return manifest
    raise AssertionError(f"there is no snapshot of {pod.spec.name}")
