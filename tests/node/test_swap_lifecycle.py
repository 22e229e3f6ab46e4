"""The life of a restored container, as kubelet sees it: like that of any other container."""

import contextlib
import datetime
import http.client
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from protos import cri_pb2 as pb
from shim.kernel import procfs
from tests.node.kubelet import Container
from tests.node.logs import LogLine
from tests.node.node import Node
from tests.node.podspec import ContainerSpec
from tests.node.swapping import (
    QUICKTHAW,
    SnapshotRef,
    answer,
    ask,
    assert_cold,
    assert_restored,
    captured,
    first_answer,
    nothing_left,
    probe,
    published,
    restored,
    said,
    wipe_snapshots,
    wishes,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

START_S = 2
"""The shared workload's needs until it is ready, beside Python's own start."""


def slow_probe(**fields: object) -> ContainerSpec:
    """Returns a probe whose cold start takes START_S."""
    script = f"sleep {START_S}; exec python3 -m workers.probe"
    return probe(command=["sh", "-c", script], **fields)


@pytest.fixture(scope="module")
def snapshot(swap_node: Node) -> Iterator[SnapshotRef]:
    """Yields the snapshot that most tests of this file start their pods from; its source is
    gone.
    """
    with nothing_left(swap_node):
        taken = captured(swap_node, slow_probe())
    yield taken
    wipe_snapshots(swap_node)


def numbers(lines: list[LogLine]) -> list[int]:
    """Returns the line numbers of the probe's log."""
    return [int(line.text.split()[0]) for line in lines]


def kill_with(container: Container, path: str) -> pb.ContainerStatus:
    """Ask the probe for an action that ends it; returns its exit."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        answer(container.pod, path)
    return container.wait_exit(timeout_s=60)


# The swap itself


def test_second_pod_has_the_process_of_the_first(swap_node: Node, snapshot: SnapshotRef) -> None:
    pod = restored(swap_node, slow_probe())
    state = first_answer(pod)
    assert (state["nonce"], state["pid"]) == (snapshot.nonce, 1)
    assert pod.container().start_took_s < START_S < snapshot.cold_s
    told = ask(pod, "/restored")
    assert told["snapshot"] == snapshot.id
    assert (told["pod"], told["uid"], told["ips"]) == ("replica", pod.uid, list(pod.ips))
    status = f"/proc/{pod.container().host_pid}"
    assert os.readlink(f"{status}/exe").startswith("/usr/bin/python3"), "its init is the worker"


def test_ten_pods_are_restored_one_after_another(swap_node: Node, snapshot: SnapshotRef) -> None:
    for number in range(10):
        with restored(swap_node, slow_probe(), name=f"replica-{number}") as pod:
            assert first_answer(pod)["nonce"] == snapshot.nonce
            assert ask(pod, "/count")["counter"] == 1, "each starts from the snapshot's own state"


def test_four_pods_are_restored_at_once(swap_node: Node, snapshot: SnapshotRef) -> None:
    names = [f"replica-{number}" for number in range(4)]
    with ThreadPoolExecutor(len(names)) as threads:
        pods = list(threads.map(lambda n: restored(swap_node, slow_probe(), name=n), names))
    for pod, count in zip(pods, range(1, 5), strict=True):
        counted = [ask(pod, "/count")["counter"] for _ in range(count)]
        assert counted == list(range(1, count + 1))
        assert ask(pod, "/state")["nonce"] == snapshot.nonce


def test_log_continues_at_the_point_of_the_capture(swap_node: Node) -> None:
    spec = probe(env={"TICK_MS": "5"})
    source = captured(swap_node, spec).source
    pod = restored(swap_node, spec)
    for each in (pod, source):
        first_answer(each)
    theirs, ours = source.container().log_lines(), pod.container().log_lines()
    assert numbers(theirs) == list(range(1, len(theirs) + 1)), "the source's log has them all"
    first = numbers(ours)[0]
    assert numbers(ours) == list(range(first, first + len(ours)))
    # The captured point is the point of the source's standstill: its longest pause.
    times = [datetime.datetime.fromisoformat(line.time) for line in theirs]
    pauses = [later - earlier for earlier, later in pairwise(times)]
    longest = pauses.index(max(pauses))
    assert numbers(theirs)[longest + 1] == first
    assert ask(pod, "/state")["lines"] <= numbers(pod.container().log_lines())[-1] + 1


# Properties of the pod itself


def test_names_and_addresses_are_those_of_the_new_pod(
    swap_node: Node, snapshot: SnapshotRef
) -> None:
    pod = restored(swap_node, slow_probe(), name="other")
    first_answer(pod)
    seen, source_ip = ask(pod, "/net"), snapshot.source.ip
    assert ask(pod, "/state")["hostname"] == "other"
    assert pod.container().output(["hostname"]).strip() == "other"
    assert pod.ip in seen["ipv4"]
    assert pod.ips[1] in seen["ipv6"]
    assert source_ip == pod.ip or source_ip not in seen["ipv4"]
    hosts = pod.container().output(["cat", "/etc/hosts"])
    assert f"{pod.ip}\tother" in hosts
    resolv = pod.container().output(["cat", "/etc/resolv.conf"])
    assert "nameserver 10.96.0.10" in resolv
    assert answer(pod, "/read?path=/etc/hosts").json()["text"] == hosts


def test_single_container_of_two_is_restored(swap_node: Node, snapshot: SnapshotRef) -> None:
    side = probe(name="side", env={"PORT": "8001"})
    chosen = {"quickthaw.io/restore.main": "auto"}
    pod = swap_node.kubelet.run_pod("two", [slow_probe(), side], annotations=chosen)
    assert_restored(pod.container())
    assert_cold(pod.container("side"))
    restored_one, cold_one = first_answer(pod), first_answer(pod, port=8001)
    assert restored_one["nonce"] == snapshot.nonce
    assert {restored_one["hostname"], cold_one["hostname"]} == {"two"}


# Exit codes and signals


@pytest.mark.parametrize("code", [0, 7])
def test_exit_code_reaches_kubelet(swap_node: Node, snapshot: SnapshotRef, code: int) -> None:
    container = restored(swap_node, slow_probe()).container()
    first_answer(container.pod)
    ended = kill_with(container, f"/exit?code={code}")
    assert (ended.exit_code, ended.reason) == (code, "Error" if code else "Completed")


def test_sigkill_is_reported_as_137(swap_node: Node, snapshot: SnapshotRef) -> None:
    container = restored(swap_node, slow_probe()).container()
    os.kill(container.host_pid, signal.SIGKILL)
    ended = container.wait_exit()
    assert (ended.exit_code, ended.reason) == (137, "Error")


def test_memory_limit_of_the_new_pod_holds(swap_node: Node, snapshot: SnapshotRef) -> None:
    limit = 96 << 20
    container = restored(swap_node, slow_probe(memory_limit_bytes=limit)).container()
    assert any(path.endswith(container.id) for _, path in procfs.cgroups(container.host_pid))
    first_answer(container.pod)
    assert ask(container.pod, "/allocate?mib=16")["allocated_mib"] == 16, "below it"
    ended = kill_with(container, "/allocate?mib=0")
    assert (ended.exit_code, ended.reason) == (137, "OOMKilled")


# Operations on a running container


def test_exec_attach_and_statistics_work(swap_node: Node, snapshot: SnapshotRef) -> None:
    container = restored(swap_node, slow_probe()).container()
    first_answer(container.pod)
    done = container.exec(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (done.stdout, done.stderr, done.exit_code) == (b"out\n", b"err\n", 3)
    assert container.output(["sh", "-c", "tr '\\0' ' ' < /proc/1/cmdline"]).startswith("python3")
    with container.attach() as attached:
        ask(container.pod, "/tick?ms=20")  # again and again: the stream attaches at any time
        assert b" tick " in attached.read_until(b" tick ")
    with container.exec_stream(["cat"], stdin=True) as stream:
        stream.write(b"both ways\n")
        assert stream.read_until(b"both ways\n") == b"both ways\n"
    stats = container.stats()
    assert stats.memory.working_set_bytes.value > 1 << 20
    assert stats.cpu.usage_core_nano_seconds.value > 0


def test_attached_stdin_reaches_the_restored_process(swap_node: Node) -> None:
    spec = probe(stdin=True)
    captured(swap_node, spec)
    container = restored(swap_node, spec).container()
    with container.attach() as attached:
        attached.write(b"from outside\n")
        assert b"stdin from outside\n" in attached.read_until(b"stdin from outside\n")


def test_stop_lets_the_signal_handler_run_within_the_grace_period(
    swap_node: Node, snapshot: SnapshotRef
) -> None:
    polite, deaf = (restored(swap_node, slow_probe(), name=name) for name in ("polite", "deaf"))
    first_answer(polite)
    ask(polite, "/term?delay_s=0.3&code=5")
    assert polite.container().stop(grace_s=20).exit_code == 5
    last = [line.text.split(" ", 1)[1] for line in polite.container().log_lines()[-2:]]
    assert last == ["signal SIGTERM", "exit 5"]
    first_answer(deaf)
    ask(deaf, "/term?delay_s=60")
    assert deaf.container().stop(grace_s=1).exit_code == 137


def test_events_equal_the_events_of_any_container(swap_node: Node, snapshot: SnapshotRef) -> None:
    with swap_node.cri.events() as events:
        container = restored(swap_node, slow_probe()).container()
        first_answer(container.pod)
        kill_with(container, "/exit?code=0")
        seen = []
        for event in events:
            if event.container_id == container.id:
                seen.append(event.container_event_type)
            if seen[-1:] == [pb.CONTAINER_STOPPED_EVENT]:
                break
    assert seen == [
        pb.CONTAINER_CREATED_EVENT,
        pb.CONTAINER_STARTED_EVENT,
        pb.CONTAINER_STOPPED_EVENT,
    ]


# Restarts


def test_restart_is_a_cold_start(swap_node: Node, snapshot: SnapshotRef) -> None:
    container = restored(swap_node, slow_probe()).container()
    first_answer(container.pod)
    kill_with(container, "/exit?code=1")
    container.restart()
    assert_cold(container)
    assert first_answer(container.pod)["nonce"] != snapshot.nonce
    said(swap_node, container.id[:12], "kubelet restarts it")


def test_restart_is_restored_if_the_pod_asks_for_it(swap_node: Node, snapshot: SnapshotRef) -> None:
    wanted = wishes(on_restart="restore")
    container = restored(swap_node, slow_probe(), annotations=wanted).container()
    first_answer(container.pod)
    ask(container.pod, "/count")
    kill_with(container, "/exit?code=1")
    container.restart()
    assert_restored(container)
    state = first_answer(container.pod)
    assert (state["nonce"], state["counter"]) == (snapshot.nonce, 0)


def test_restored_containers_outlive_containerd(swap_node: Node, snapshot: SnapshotRef) -> None:
    stays, ends = (restored(swap_node, slow_probe(), name=name) for name in ("stays", "ends"))
    for pod in (stays, ends):
        first_answer(pod)
    swap_node.restart_containerd()
    assert ask(stays, "/state")["nonce"] == snapshot.nonce
    assert stays.container().running
    assert b"ok" in stays.container().exec(["echo", "ok"]).stdout
    assert kill_with(ends.container(), "/exit?code=7").exit_code == 7
    assert stays.container().stop(grace_s=10).exit_code == 0
    # The daemon has connected again, too.
    another = restored(swap_node, slow_probe(), name="another")
    assert first_answer(another)["nonce"] == snapshot.nonce


def test_restored_container_can_be_captured(swap_node: Node, snapshot: SnapshotRef) -> None:
    first = restored(swap_node, slow_probe(), name="first")
    first_answer(first)
    ask(first, "/count")
    swap_node.run([QUICKTHAW, "capture", "first"])
    taken = published(first)
    assert taken != snapshot.id
    second = restored(swap_node, slow_probe(), name="second")
    state = first_answer(second)
    assert (state["nonce"], state["counter"]) == (snapshot.nonce, 1)
    assert ask(first, "/count")["counter"] == 2, "its source goes on"
    swap_node.kubelet.remove_pods()
    wipe_one = f"rm -rf /var/lib/quickthaw/snapshots/{taken}"
    with swap_node.daemon_stopped():
        swap_node.run(["sh", "-c", wipe_one])
