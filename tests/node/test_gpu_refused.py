"""A container that could be checkpointed and never restored is refused before the capture touches
it.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from tests.node.gpus import MODEL, SHARED_MEMORY, checked, describe, gpu_probe, restart_daemon
from tests.node.kubelet import Pod
from tests.node.node import Node
from tests.node.podspec import ContainerSpec
from tests.node.swapping import (
    QUICKTHAW,
    ask,
    assert_cold,
    captured,
    first_answer,
    nothing_left,
    said,
    wishes,
)


@pytest.fixture(autouse=True)
def _nothing_stays(gpu_node: Node) -> Iterator[None]:
    with nothing_left(gpu_node):
        yield


def refused(node: Node, spec: ContainerSpec, *codes: str, do: str, **rest: Any) -> Pod:
    """A pod of which no snapshot is made, for these reasons; it goes on serving, untouched."""
    calls = {"quiesce": "http POST :8000/quiesce", "resume": "http POST :8000/resume"}
    annotations = wishes(capture_when="signal", **calls)
    pod = node.kubelet.run_pod("source", [spec], annotations=annotations, **rest)
    first_answer(pod)
    return pod if not codes else told(node, pod, *codes, do=do)


def told(node: Node, pod: Pod, *codes: str, do: str) -> Pod:
    """The pod says that it is ready, and is refused."""
    ask(pod, "/ready")
    line = said(node, f"({pod.container().id[:12]})", "no snapshot was made", within_s=30)
    assert all(f"{code}: " in line for code in codes), line
    assert do in line
    checked(pod)
    assert ask(pod, "/called") == [], "not even quiesced"
    return pod


def explained(node: Node, pod: Pod) -> Mapping[str, Any]:
    """Returns the rows of `quickthaw explain` about a capture, by code."""
    answer = json.loads(node.call([QUICKTHAW, "explain", pod.spec.name, "--json"]).stdout)
    return {row["code"]: row for row in answer["capture"]}


def test_several_cuda_processes_that_may_share_memory_are_refused(gpu_node: Node) -> None:
    spec = gpu_probe(0, env={"CASE": "sharing", "CHILDREN": "1"})
    pod = refused(gpu_node, spec, "gpu_sharing", do="NCCL_P2P_DISABLE=1 NCCL_CUMEM_ENABLE=0")
    row = explained(gpu_node, pod)["gpu_sharing"]
    assert not row["fits"]
    assert "NCCL_P2P_DISABLE=1" in row["do"]


def test_process_with_contexts_on_two_gpus_is_refused(gpu_node: Node) -> None:
    spec = gpu_probe(0, 1, env={"CASE": "peers", "DEVICES": "0,1"})
    pod = refused(gpu_node, spec, "gpu_peers", do="CUDA_VISIBLE_DEVICES")
    assert explained(gpu_node, pod)["gpu_driver"]["fits"]


def test_gpu_pod_in_the_network_of_the_node_is_refused(gpu_node: Node) -> None:
    spec = gpu_probe(0, env={"CASE": "network", "PORT": "8000", "LISTEN": "127.0.0.1"})
    pod = gpu_node.kubelet.run_pod("source", [spec], annotations=wishes(), host_network=True)
    said(gpu_node, f"({pod.container().id[:12]})", "gpu_host_network: ", "hostNetwork", within_s=30)


def test_pod_under_mps_is_refused(gpu_node: Node) -> None:
    env = {"CASE": "mps", "CUDA_MPS_PIPE_DIRECTORY": "/tmp/mps"}
    refused(gpu_node, gpu_probe(0, env=env), "gpu_mps", do="without MPS")


def test_memory_limit_without_room_for_staging_memory_is_refused(gpu_node: Node) -> None:
    env = {"CASE": "limit", "MIB": "64"}
    spec = gpu_probe(0, env=env, memory_limit_bytes=160 << 20)
    refused(gpu_node, spec, "gpu_host_memory", do="Raise the memory limit")


@pytest.mark.parametrize(
    ("line", "code", "do"),
    [("0 143771 1 0", "gpu_mig", "not split"), ("0 143771 0 3", "gpu_exclusive", "-c DEFAULT")],
)
def test_gpu_with_mig_or_in_exclusive_mode_is_refused(
    gpu_node: Node, line: str, code: str, do: str
) -> None:
    describe(gpu_node, [f"{line} NVIDIA H200", f"1 {MODEL}"])
    restart_daemon(gpu_node)
    try:
        refused(gpu_node, gpu_probe(0, env={"CASE": code}), code, do=do)
    finally:
        describe(gpu_node, [f"{minor} {MODEL}" for minor in (0, 1)])
        restart_daemon(gpu_node)


def test_too_old_driver_is_refused(gpu_node: Node) -> None:
    gpu_node.write("/run/cuda-standin/driver", "535.104.05\n")
    try:
        spec = gpu_probe(0, env={"CASE": "old driver"})
        refused(gpu_node, spec, "gpu_driver", do="Install driver 580")
    finally:
        describe(gpu_node, [f"{minor} {MODEL}" for minor in (0, 1)])


@pytest.mark.parametrize("code", ["gpu_exclusive", "gpu_mig"])
def test_gpu_with_another_setup_than_at_the_capture_is_refused(gpu_node: Node, code: str) -> None:
    spec = gpu_probe(0, env={"CASE": f"since {code}", **SHARED_MEMORY})
    captured(gpu_node, spec).source.remove(grace_s=0)
    mig, mode = (1, 0) if code == "gpu_mig" else (0, 3)
    describe(gpu_node, [f"0 143771 {mig} {mode} NVIDIA H200", f"1 {MODEL}"])
    restart_daemon(gpu_node)
    try:
        pod = gpu_node.kubelet.run_pod("replica", [spec], annotations=wishes())
        assert_cold(pod.container())
        said(gpu_node, pod.container().id[:12], "gpu: " if code == "gpu_mig" else f"{code}: ")
    finally:
        describe(gpu_node, [f"{minor} {MODEL}" for minor in (0, 1)])
        restart_daemon(gpu_node)
