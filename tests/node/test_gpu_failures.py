"""Failures with GPUs end as documented: the source serves or starts anew, the target is cold."""

import json
import time
from collections.abc import Iterator
from typing import Any, Final

import pytest

from shim.contract.paths import FAULTS
from tests.node.gpus import SHARED_MEMORY, checked, fault, gpu_probe, in_use
from tests.node.kubelet import Pod
from tests.node.node import Node
from tests.node.podspec import ContainerSpec
from tests.node.swapping import (
    RESTORE,
    ask,
    assert_cold,
    captured,
    first_answer,
    is_restored,
    nothing_left,
    said,
    wishes,
)

WITHIN_S = 30.0


@pytest.fixture(autouse=True)
def _nothing_stays(gpu_node: Node) -> Iterator[None]:
    """Neither on the node nor on its GPUs."""
    with nothing_left(gpu_node):
        yield
    assert set(in_use(gpu_node).values()) == {0}


MIB = {"driver": 4, "direct": 24}
"""Of each process: from 8 MiB on the library takes it."""


def two_processes(case: str, mib: int = MIB["driver"]) -> ContainerSpec:
    env = {"CASE": case, "CHILDREN": "1", "MIB": str(mib), **SHARED_MEMORY}
    return gpu_probe(0, 1, env=env)


def ready_source(node: Node, spec: ContainerSpec, **wanted: str) -> Pod:
    """A pod that is captured as soon as it says that it is ready."""
    pod = node.kubelet.run_pod(
        "source", [spec], annotations=wishes(capture_when="signal", **wanted)
    )
    first_answer(pod)
    return pod


def failed(node: Node, pod: Pod) -> str:
    """Have the pod captured, which must fail; the journal's line."""
    ask(pod, "/ready")
    return said(node, f"({pod.container().id[:12]})", "no snapshot was made", within_s=WITHIN_S)


CALLS = {"quiesce": "http POST :8000/quiesce", "resume": "http POST :8000/resume"}


@pytest.mark.parametrize(
    ("call", "what", "word"),
    [
        ("lock.once", "error 999", "CUDA_ERROR_UNKNOWN"),
        ("checkpoint.once", "error 2", "CUDA_ERROR_OUT_OF_MEMORY"),
        ("state", "refuse 999", "CUDA_ERROR_UNKNOWN"),
    ],
)
def test_a_driver_that_refuses_leaves_the_source_serving(
    gpu_node: Node, call: str, what: str, word: str
) -> None:
    pod = ready_source(gpu_node, two_processes(call), **CALLS)
    with fault(gpu_node, call, what):
        assert word in failed(gpu_node, pod)
    checked(pod)
    assert ask(pod, "/called")[-1:] in ([], ["resume"])
    gpu_node.run(["quickthaw", "capture", pod.spec.name])
    checked(pod)


@pytest.mark.parametrize("call", ["lock", "checkpoint", "restore", "unlock"])
def test_a_helper_that_dies_in_a_capture_is_replaced(gpu_node: Node, call: str) -> None:
    spec = two_processes(f"capture {call} dies")
    pod = ready_source(gpu_node, spec)
    with fault(gpu_node, f"{call}.once", "die"):
        ask(pod, "/ready")
        said(gpu_node, f"({pod.container().id[:12]}) captured as ", within_s=WITHIN_S)
    checked(pod)


def test_endless_device_work_leaves_the_source_serving(gpu_node: Node) -> None:
    pod = ready_source(gpu_node, two_processes("works on"))
    ask(pod, "/gpu/busy?ms=14000")
    assert "still has work on the GPU" in failed(gpu_node, pod)
    checked(pod)


def test_a_source_that_the_driver_does_not_give_back_is_killed(gpu_node: Node) -> None:
    pod = ready_source(gpu_node, two_processes("stuck"), **CALLS)
    nonce = ask(pod, "/state")["nonce"]
    with fault(gpu_node, "restore.once", "stuck 2"):
        ask(pod, "/ready")
        line = said(gpu_node, "the GPU did not give the source back", within_s=WITHIN_S)
    assert "the container was killed" in line
    assert pod.container().wait_exit().exit_code == 137
    pod.container().restart()
    assert first_answer(pod)["nonce"] != nonce
    checked(pod)


def test_a_source_that_dies_in_its_checkpoint_is_started_anew(gpu_node: Node) -> None:
    pod = ready_source(gpu_node, gpu_probe(0, env={"CASE": "dies"}))
    with fault(gpu_node, "checkpoint.once", "kill"):
        ask(pod, "/ready")
        assert pod.container().wait_exit().exit_code == 137
    pod.container().restart()
    first_answer(pod)
    checked(pod)


def armed(node: Node, point: str, action: str) -> None:
    path = node.path(FAULTS)
    path.write_text(json.dumps({"faults": [{"point": point, "action": action}]}))
    path.chmod(0o600)


POINTS: Final = (
    "capture.gpu.noted", "capture.gpu.locked", "capture.gpu.checkpointed", "capture.frozen",
    "capture.gpu.restored", "capture.thawed",
)  # fmt: skip
KILLS: Final = [
    *(("driver", point) for point in POINTS),
    *(("direct", point) for point in (*POINTS, "capture.gpu.taken")),
]
"""The way `driver` takes nothing away before its checkpoint."""


@pytest.mark.parametrize(("way", "point"), KILLS, ids=[f"{way}-{point}" for way, point in KILLS])
def test_a_daemon_that_is_killed_leaves_the_source_serving(
    gpu_node: Node, way: str, point: str
) -> None:
    pod = ready_source(gpu_node, two_processes(f"{point} {way}", MIB[way]), gpu=way)
    nonce = ask(pod, "/state")["nonce"]
    armed(gpu_node, point, "kill")
    gpu_node.stop_daemon()
    gpu_node.start_daemon()
    ask(pod, "/ready")
    said(gpu_node, f"fault point {point} is armed")
    until = time.monotonic() + WITHIN_S
    while gpu_node.path(f"/proc/{gpu_node.daemon_pid}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    try:
        found = checked(pod)  # with no daemon
        assert len(found["processes"]) == 2
    finally:
        gpu_node.path(FAULTS).unlink()
        gpu_node.kill_daemon()
        gpu_node.start_daemon()
    said(gpu_node, f"({pod.container().id[:12]}) captured as ", within_s=WITHIN_S)
    assert ask(pod, "/state")["nonce"] == nonce
    checked(pod)


# The target


def replica_of(node: Node, spec: ContainerSpec, **more: str) -> tuple[Pod, str]:
    """A snapshot's second pod, and the nonce of the first, which is gone."""
    taken = captured(node, spec)
    nonce: str = ask(taken.source, "/state")["nonce"]
    taken.source.remove(grace_s=0)
    annotations = {**RESTORE, **{f"quickthaw.io/{name}": value for name, value in more.items()}}
    return node.kubelet.make_pod("replica", [spec], annotations=annotations), nonce


def started(pod: Pod) -> dict[str, Any]:
    """Starts a pod; returns the first answer of its worker."""
    pod.run_sandbox()
    pod.container().create()
    pod.container().start()
    answer: dict[str, Any] = first_answer(pod)
    return answer


@pytest.mark.parametrize(
    ("call", "what", "word"),
    [
        ("restore.once", "stuck 2", "CUDA_ERROR_OUT_OF_MEMORY"),
        ("restore.once", "error 46", "CUDA error 46"),
        ("restore.once", "kill", "restore of process"),
        ("unlock.once", "error 999", "CUDA_ERROR_UNKNOWN"),
        ("restore", "hang", "deadline"),
        ("restore", "refuse 801", "CUDA_ERROR_NOT_SUPPORTED"),
    ],
)
def test_a_restore_that_the_driver_refuses_becomes_a_cold_start(
    gpu_node: Node, call: str, what: str, word: str
) -> None:
    pod, nonce = replica_of(gpu_node, two_processes(f"{call} {what}"), deadline="4s")
    with fault(gpu_node, call, what):
        state = started(pod)
    assert state["nonce"] != nonce
    assert_cold(pod.container())
    checked(pod)
    assert ask(pod, "/restored") is None
    line = said(gpu_node, f"({pod.container().id[:12]})", "starts cold")
    assert word in line, line


@pytest.mark.parametrize("call", ["restore", "unlock"])
def test_a_helper_that_dies_in_a_restore_is_replaced(gpu_node: Node, call: str) -> None:
    pod, nonce = replica_of(gpu_node, two_processes(f"restore {call} dies"))
    with fault(gpu_node, f"{call}.once", "die"):
        assert started(pod)["nonce"] == nonce
    assert is_restored(pod.container())
    checked(pod)
