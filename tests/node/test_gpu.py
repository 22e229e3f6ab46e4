"""Containers with GPUs are captured and restored; with a stand-in for the CUDA driver."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.node.attacking import own_spec, run_helper
from tests.node.gpus import SHARED_MEMORY, checked, gpu_probe, in_use, octets, uuid
from tests.node.kubelet import Pod
from tests.node.node import Node
from tests.node.podspec import ContainerSpec
from tests.node.swapping import (
    SnapshotRef,
    ask,
    captured,
    first_answer,
    nothing_left,
    probe,
    restored,
    wait_until,
)


@pytest.fixture(autouse=True)
def _nothing_stays(gpu_node: Node) -> Iterator[None]:
    """Neither on the node nor on its GPUs."""
    with nothing_left(gpu_node):
        yield
    assert set(in_use(gpu_node).values()) == {0}


def taken_and_gone(node: Node, spec: ContainerSpec) -> tuple[SnapshotRef, dict[str, Any]]:
    """A snapshot, and what its source told of its GPUs after the capture, which it survived."""
    taken = captured(node, spec, before=checked)
    there = checked(taken.source) | {"nonce": ask(taken.source, "/state")["nonce"]}
    taken.source.remove(grace_s=0)
    return taken, there


def is_same(replica: Pod, there: dict[str, Any]) -> bool:
    """Whether it is the captured process."""
    return bool(first_answer(replica)["nonce"] == there["nonce"])


def test_device_memory_comes_back(gpu_node: Node) -> None:
    spec = gpu_probe(0, env={"CASE": "simple"})
    taken, there = taken_and_gone(gpu_node, spec)
    assert {"gpu_checkpoint", "gpu_restore"} <= taken.manifest()["timings"].keys()
    replica = restored(gpu_node, spec)
    assert is_same(replica, there)
    assert checked(replica)["processes"] == there["processes"]
    assert ask(replica, "/restored")["gpus"] == {uuid(0): uuid(0)}
    assert in_use(gpu_node)[0] > 32 << 20, "the memory is on the device again"


@pytest.mark.attack("a pod gives a process a name that is no text: no pod with GPUs is captured")
def test_odd_name_of_another_pods_process_does_not_stop_captures(gpu_node: Node) -> None:
    with gpu_node.kubelet.run_pod("other", [own_spec("odd")]) as other:
        first_answer(other)
        odd = r"ctypes.CDLL(None).prctl(15, b'\xff\xfe', 0, 0, 0)"
        run_helper(other.container(), f"{odd}\nopen('/srv/is-odd', 'w').close()\ntime.sleep(3600)")

        def is_there() -> bool:
            return other.container().exec(["test", "-e", "/srv/is-odd"]).exit_code == 0

        wait_until(is_there, "the helper does not run", gpu_node, within_s=20)
        taken_and_gone(gpu_node, gpu_probe(0, env={"CASE": "odd neighbour"}))


def test_another_gpu_of_the_same_model_takes_the_place(gpu_node: Node) -> None:
    spec = gpu_probe(0, env={"CASE": "other gpu", "NVIDIA_VISIBLE_DEVICES": uuid(0)})
    _, there = taken_and_gone(gpu_node, spec)
    other = gpu_probe(1, env={"CASE": "other gpu", "NVIDIA_VISIBLE_DEVICES": uuid(1)})
    replica = restored(gpu_node, other)
    assert is_same(replica, there)
    assert checked(replica)["processes"][0]["uuids"] == [octets(1)]
    assert ask(replica, "/restored")["gpus"] == {uuid(0): uuid(1)}
    assert in_use(gpu_node)[0] == 0


def test_several_processes_with_a_gpu_each_come_back(gpu_node: Node) -> None:
    spec = gpu_probe(0, 1, env={"CASE": "processes", "CHILDREN": "3", **SHARED_MEMORY})
    _, there = taken_and_gone(gpu_node, spec)
    assert len(there["processes"]) == 4
    replica = restored(gpu_node, spec)
    assert is_same(replica, there)
    assert checked(replica)["processes"] == there["processes"]


def test_a_restored_container_is_captured_again(gpu_node: Node) -> None:
    spec = gpu_probe(0, env={"CASE": "again"})
    taken_and_gone(gpu_node, spec)
    replica = restored(gpu_node, spec)
    first_answer(replica)
    gpu_node.run(["quickthaw", "capture", replica.spec.name])
    there = checked(replica) | {"nonce": ask(replica, "/state")["nonce"]}
    replica.remove(grace_s=0)
    again = restored(gpu_node, spec, name="second")
    assert is_same(again, there)
    assert checked(again)["processes"] == there["processes"]


def test_a_container_whose_gpu_nobody_uses_is_captured_like_any_other(gpu_node: Node) -> None:
    spec = probe(env={"CASE": "unused"}, devices=["/dev/nvidia0", "/dev/nvidiactl"])
    taken = captured(gpu_node, spec)
    taken.source.remove(grace_s=0)
    assert "gpu_checkpoint" not in taken.manifest()["timings"]
    assert first_answer(restored(gpu_node, spec))["nonce"] == taken.nonce


def test_work_on_the_device_is_waited_for(gpu_node: Node) -> None:
    spec = gpu_probe(0, env={"CASE": "busy"})
    taken = captured(gpu_node, spec, before=lambda pod: ask(pod, "/gpu/busy?ms=1500"))
    assert taken.manifest()["timings"]["gpu_checkpoint"] > 0.1
    checked(taken.source)
