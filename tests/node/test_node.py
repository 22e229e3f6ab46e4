"""The node itself: properties that every other test of this directory takes for granted."""

import json
import os
import time
from collections.abc import Iterator

import pytest

from protos import cri_pb2 as pb
from tests.node.enclosure import CommandStuck
from tests.node.inventory import take_host
from tests.node.node import Node
from tests.node.podspec import ConfigMap, ContainerSpec, EmptyDir, HostPath, VolumeMount


@pytest.fixture(autouse=True)
def nothing_stays_behind(node: Node) -> Iterator[None]:
    before = node.inventory()
    yield
    node.kubelet.remove_pods()
    assert node.inventory().less(before) == {}, "this test left something on the node"


def shell(image: str, script: str) -> ContainerSpec:
    return ContainerSpec(image, args=["-c", script])


def test_pod_runs_and_its_log_arrives(node: Node, shell_image: str) -> None:
    pod = node.kubelet.run_pod("hello", [shell(shell_image, "echo hello; echo oops >&2; exit 7")])
    ended = pod.container().wait_exit()
    assert ended.exit_code == 7
    by_stream = {(line.stream, line.text) for line in pod.container().log_lines()}
    assert by_stream == {("stdout", "hello"), ("stderr", "oops")}


def test_command_runs_in_a_container(node: Node, shell_image: str) -> None:
    pod = node.kubelet.run_pod("exec", [shell(shell_image, "sleep 1000")])
    done = pod.container().exec(["/bin/sh", "-c", "echo $HOSTNAME; echo no >&2; exit 3"])
    assert (done.stdout, done.stderr, done.exit_code) == (b"exec\n", b"no\n", 3)


def test_exec_and_attach_carry_all_streams(node: Node, shell_image: str) -> None:
    script = "while read line; do echo got $line; done"
    spec = ContainerSpec(shell_image, args=["-c", script], stdin=True)
    container = node.kubelet.run_pod("attach", [spec]).container()
    with container.attach() as attached:
        attached.write(b"one\n")
        assert attached.read_until(b"got one\n") == b"got one\n"
    with container.exec_stream(["/bin/sh", "-c", "read x; echo $x; exit 3"], stdin=True) as done:
        done.write(b"in\n")
        assert done.read_all() == b"in\n"
    assert '"3"' in json.dumps(done.status)


def test_cri_events_report_the_life_of_a_container(node: Node, shell_image: str) -> None:
    with node.cri.events() as events:
        pod = node.kubelet.run_pod("events", [shell(shell_image, "exit 0")])
        container = pod.container().id
        seen = []
        for event in events:
            if event.container_id == container:
                seen.append(event.container_event_type)
            if seen[-1:] == [pb.CONTAINER_STOPPED_EVENT]:
                break
    assert seen == [
        pb.CONTAINER_CREATED_EVENT,
        pb.CONTAINER_STARTED_EVENT,
        pb.CONTAINER_STOPPED_EVENT,
    ]


def test_limits_are_in_the_spec_and_statistics_arrive(node: Node, shell_image: str) -> None:
    args = ["-c", "sleep 1000"]
    spec = ContainerSpec(shell_image, args=args, memory_limit_bytes=64 << 20, cpu_limit_cores=0.5)
    container = node.kubelet.run_pod("limits", [spec]).container()
    limits = container.info()["runtimeSpec"]["linux"]["resources"]
    assert limits["memory"]["limit"] == 64 << 20
    assert limits["cpu"]["quota"] == 50_000
    assert 0 < container.stats().memory.working_set_bytes.value < 64 << 20


def test_node_reaches_the_addresses_of_pods(node: Node, shell_image: str) -> None:
    serve = "while :; do printf 'HTTP/1.0 200 OK\\r\\n\\r\\nhere' | busybox nc -l -p 8000; done"
    pod = node.kubelet.run_pod("web", [shell(shell_image, f"echo up; {serve}")])
    pod.container().wait_log("up")
    v4, v6 = pod.ips
    assert "." in v4
    assert ":" in v6
    answer = node.http_get(v4, 8000, "/", retry_s=10)
    assert (answer.status, answer.body) == (200, b"here")
    assert v4 in pod.container().output(["/bin/cat", "/etc/hosts"])
    assert "ndots:5" in pod.container().output(["/bin/cat", "/etc/resolv.conf"])


def test_volumes_of_every_kind_are_mounted(node: Node, shell_image: str) -> None:
    node.write("/srv/host/file", "from the host")
    settings = ConfigMap("settings", {"key": "value"})
    mounts = [
        VolumeMount("/host", HostPath("/srv/host"), read_only=True),
        VolumeMount("/disk", EmptyDir("disk")),
        VolumeMount("/memory", EmptyDir("memory", in_memory=True)),
        VolumeMount("/settings", settings, read_only=True),
    ]
    script = "cat /host/file /settings/key; echo kept > /disk/a; echo kept > /memory/a; sleep 1000"
    spec = ContainerSpec(shell_image, args=["-c", script], mounts=mounts, read_only_root=True)
    pod = node.kubelet.run_pod("volumes", [spec])
    account = "/run/secrets/kubernetes.io/serviceaccount"
    assert pod.container().output(["/bin/cat", f"{account}/namespace"]) == "default"
    assert (pod.volume(EmptyDir("disk")) / "a").read_text() == "kept\n"
    assert (pod.volume(EmptyDir("memory", in_memory=True)) / "a").read_text() == "kept\n"


def test_restart_is_a_new_attempt_with_a_log_of_its_own(node: Node, shell_image: str) -> None:
    pod = node.kubelet.run_pod("again", [shell(shell_image, "echo once; exit 1")])
    container = pod.container()
    first = container.id
    for _ in range(2):
        container.restart()
    assert container.wait_exit().metadata.attempt == 2
    assert container.logs() == "once\n"
    assert first not in {each.id for each in node.cri.containers(pod.sandbox_id)}


def test_stop_waits_for_the_grace_period(node: Node, shell_image: str) -> None:
    script = "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.1; done"
    pod = node.kubelet.run_pod("stop", [shell(shell_image, script)])
    pod.container().wait_log("up")
    assert pod.container().stop().exit_code == 5
    assert pod.container().logs() == "up\nbye\n"


def test_container_outlives_containerd(node: Node, shell_image: str) -> None:
    pod = node.kubelet.run_pod("stays", [shell(shell_image, "sleep 1000")])
    pid = pod.container().host_pid
    node.restart_containerd()
    assert pod.container().running
    assert pod.container().host_pid == pid
    os.kill(pid, 9)
    assert pod.container().wait_exit().exit_code == 137


def test_node_leaves_the_host_alone(node: Node) -> None:
    """A second node comes and goes beside the first."""
    before = take_host(os.getpid())
    with Node(node.suite) as second:
        second.start_containerd()
        assert take_host(os.getpid()) != before
    assert take_host(os.getpid()) == before


def test_error_names_a_hanging_command_and_its_activity(node: Node) -> None:
    with pytest.raises(CommandStuck, match=r"(?s)`sleep 60` in .* S .* S "):
        node.call(["sleep", "60"], timeout_s=0.5)
    deadline = time.monotonic() + 30
    while any("sleep" in each for each in node.inventory().processes):
        assert time.monotonic() < deadline, "the command is killed with the call"
        time.sleep(0.02)
