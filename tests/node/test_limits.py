"""Limits: restores at once, the deadline of a swap, and how much snapshots may take."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shim.kernel import lineage, procfs
from tests.node.attacking import run_helper
from tests.node.kubelet import Container, Pod
from tests.node.node import Node
from tests.node.pageserver import armed
from tests.node.podspec import ContainerSpec
from tests.node.swapping import (
    QUICKTHAW,
    RESTORE,
    RUN,
    SNAPSHOTS,
    SnapshotRef,
    ask,
    assert_cold,
    assert_restored,
    captured,
    first_answer,
    is_restored,
    probe,
    restore_log,
    said,
    wait_until,
    wipe_snapshots,
    wishes,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

DROP_IN = "/etc/quickthaw/quickthaw.d/90-test.toml"
TURNS = f"{RUN}/turns"
STORE = "/var/lib/quickthaw"
STAGING = f"{STORE}/staging"
DEADLINE_S = 2.0
COLD_WITHIN_S = 8.0
"""Time of the cold start beside the deadline, on a busy machine: less than the undo may take."""


@pytest.fixture(autouse=True, scope="module")
def no_snapshots_after_it(swap_node: Node) -> Iterator[None]:
    yield
    wipe_snapshots(swap_node)


@contextlib.contextmanager
def configured(node: Node, **values: object) -> Iterator[None]:
    """Gives the daemon these values of its configuration inside of the `with`."""
    text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
    node.path(DROP_IN).parent.mkdir(exist_ok=True)
    with node.daemon_stopped():
        node.write(DROP_IN, text)
    try:
        yield
    finally:
        with node.daemon_stopped():
            node.path(DROP_IN).unlink()


def own_spec(case: str) -> ContainerSpec:
    return probe(env={"CASE": f"limits-{case}"})


def own_snapshot(node: Node, case: str) -> SnapshotRef:
    taken = captured(node, own_spec(case))
    taken.source.remove(grace_s=0)
    return taken


def start(node: Node, case: str, name: str = "replica", **more: str) -> Pod:
    annotations = RESTORE | {f"quickthaw.io/{key}": value for key, value in more.items()}
    pod = node.kubelet.run_pod(name, [own_spec(case)], annotations=annotations)
    first_answer(pod)
    return pod


# Restores at once


@contextlib.contextmanager
def turn_held(node: Node, number: int) -> Iterator[None]:
    """Holds a turn, like a restore without an end."""
    node.path(TURNS).mkdir(exist_ok=True)
    script = f"exec 9>{TURNS}/{number}; flock 9; exec sleep 1000"
    held = node.popen(["sh", "-c", script])
    try:
        wait_until(node.path(f"{TURNS}/{number}").exists, "there is no lock", node)
        time.sleep(0.1)
        yield
    finally:
        held.kill()
        held.wait()
        node.call(["sh", "-c", f"rm -f {TURNS}/{number}"])


def test_restore_without_a_turn_starts_cold_and_blames_no_snapshot(swap_node: Node) -> None:
    taken = own_snapshot(swap_node, "turns")
    with configured(swap_node, max_restores_at_once=1, restore_wait_s=0.5):
        with turn_held(swap_node, 1):
            for number in range(3):
                pod = start(swap_node, "turns", f"replica-{number}")
                assert_cold(pod.container())
                said(swap_node, pod.container().id[:12], "restore queue timed out", "starts cold")
        assert not swap_node.path(f"/var/lib/quickthaw/quarantine/{taken.id}.json").exists()
        with ThreadPoolExecutor(4) as threads:
            names = [f"one-of-{number}" for number in range(4)]
            pods = list(threads.map(lambda name: start(swap_node, "turns", name), names))
        assert all(first_answer(pod)["nonce"] for pod in pods)
        assert any(is_restored(pod.container()) for pod in pods)
    assert list(swap_node.path(TURNS).iterdir()) == []


# The deadline, on the whole tree


def tree(pid: int) -> list[int]:
    return [pid, *lineage.descendants(pid)]


def criu_has_begun(log: Path) -> bool:
    return log.exists()


def processes_are_there(log: Path) -> bool:
    return log.exists() and b"Forking" in log.read_bytes()


def memory_is_there(log: Path) -> bool:
    return log.exists() and b"pie: " in log.read_bytes()


@pytest.mark.parametrize("when", [criu_has_begun, processes_are_there, memory_is_there])
def test_hanging_criu_ends_at_the_deadline(swap_node: Node, when: Callable[[Path], bool]) -> None:
    case = f"hangs-{when.__name__}"
    taken = own_snapshot(swap_node, case)
    annotations = RESTORE | {"quickthaw.io/deadline": f"{DEADLINE_S:g}s"}
    pod = swap_node.kubelet.make_pod("replica", [own_spec(case)], annotations=annotations)
    pod.run_sandbox()
    container = pod.container()
    container.create()
    log = restore_log(container)
    with telling_criu(swap_node) as pids, ThreadPoolExecutor(1) as thread:
        began = time.monotonic()
        starting = thread.submit(container.start)
        hung = stopped_criu(swap_node, pids, lambda: when(log))
        starting.result()
        took = time.monotonic() - began
    assert_cold(container)
    assert first_answer(pod)["nonce"] != taken.nonce
    said(swap_node, container.id[:12], "deadline passed", "starts cold")
    assert DEADLINE_S < took < DEADLINE_S + COLD_WITHIN_S
    assert not Path(f"/proc/{hung}").exists(), "CRIU is still there"
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not strangers(container), "", swap_node)
    assert strangers(container) == [], "in the cgroup is more than the container"
    assert "criu" not in swap_node.run(["cat", "/proc/self/mountinfo"])


TELLING = """echo $$ >>/run/criu-pids
for _ in $(seq 300); do [ -e /run/criu-go.$$ ] && break; sleep 0.01; done"""


@contextlib.contextmanager
def telling_criu(node: Node) -> Iterator[Path]:
    """Replaces criu by a program that reports each call; yields the file with its pids.

    The program waits until `stopped_criu` has found its process, for 3 s at most.
    """
    pids = node.path("/run/criu-pids")
    try:
        with criu_after(node, TELLING):
            yield pids
    finally:
        for path in (pids, *pids.parent.glob("criu-go.*")):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def criu_after(node: Node, line: str) -> Iterator[None]:
    """Replaces criu by a shell script that runs `line` before it becomes criu."""
    own = node.run(["sh", "-c", "readlink -f $(command -v criu)"]).strip()
    path = node.path(own)
    real = path.with_name("criu.real")
    path.rename(real)
    path.write_text(f'#!/bin/sh\n{line}\nexec {own}.real "$@"\n')
    path.chmod(0o755)
    try:
        yield
    finally:
        real.rename(path)


def stopped_criu(node: Node, pids: Path, when: Callable[[], bool]) -> int:
    """Stop the criu that was called last as soon as `when`; returns its pid.

    Raises ProcessLookupError if CRIU was faster.
    """
    known: list[str] = []
    host_pid = 0

    def reached() -> bool:
        nonlocal host_pid
        called = pids.read_text().split() if pids.exists() else []
        if called and (called != known or not host_pid):
            known[:] = called
            host_pid = 0
            with contextlib.suppress(OSError, ValueError, LookupError):
                host_pid = node.host_pid(int(called[-1]))
                pids.with_name(f"criu-go.{called[-1]}").touch()
        return bool(host_pid) and when()

    usual = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, -20)  # of this thread, which other work must not delay
    try:
        wait_until(reached, "CRIU does not come so far", node, every_s=0.0005)
        os.kill(host_pid, signal.SIGSTOP)
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, usual)
    return host_pid


def strangers(container: Container) -> list[str]:
    """Returns processes in the container's cgroup that do not descend from its init: pid, name,
    state.
    """
    own = tree(container.host_pid)
    found = [pid for pid in procfs.pids() if pid not in own and in_cgroup(pid, container.id)]
    told = []
    for pid in found:
        with contextlib.suppress(OSError):
            told.append(f"{pid} {procfs.comm(pid)!r} {procfs.state(pid)} {procfs.parent(pid)}")
    return told


def in_cgroup(pid: int, container: str) -> bool:
    with contextlib.suppress(OSError):
        return any(container in path for _, path in procfs.cgroups(pid))
    return False


@pytest.mark.parametrize("point", ["restore.check", "restore.rootfs.mounted", "restore.told"])
def test_hanging_step_ends_soon_after_the_deadline(
    swap_node: Node, hanging: SnapshotRef, point: str
) -> None:
    with armed(swap_node, point, "hang"):
        began = time.monotonic()
        pod = start(swap_node, "hanging", deadline=f"{DEADLINE_S:g}s")
        took = time.monotonic() - began
    assert_cold(pod.container())
    assert first_answer(pod)["nonce"] != hanging.nonce
    said(swap_node, pod.container().id[:12], "deadline passed", "starts cold")
    assert DEADLINE_S < took < DEADLINE_S + COLD_WITHIN_S


@pytest.fixture(scope="module")
def hanging(swap_node: Node) -> SnapshotRef:
    return own_snapshot(swap_node, "hanging")


# How much snapshots may take


def test_capture_above_max_snapshot_bytes_is_refused(swap_node: Node) -> None:
    with configured(swap_node, max_snapshot_bytes=1 << 20):
        pod = swap_node.kubelet.run_pod("source", [own_spec("big")], annotations=wishes())
        said(swap_node, pod.container().id[:12], "no snapshot of this size", "goes on serving")
        assert ask(pod, "/state")["nonce"]
    assert list(swap_node.path(STAGING).iterdir()) == []


def test_least_recently_used_snapshot_is_evicted(swap_node: Node) -> None:
    wipe_snapshots(swap_node)
    first, second = own_snapshot(swap_node, "first"), own_snapshot(swap_node, "second")
    sizes = [sum(taken.manifest()["sizes"].values()) for taken in (first, second)]
    pod = start(swap_node, "first")
    assert_restored(pod.container())
    pod.remove(grace_s=0)
    with configured(
        swap_node, max_store_bytes=int(sum(sizes) + min(sizes) / 2), evict_after_s=0.001
    ):
        third = own_snapshot(swap_node, "third")
        said(swap_node, second.id[:12], "is removed to make room")
        left = {path.name for path in swap_node.path(SNAPSHOTS).iterdir()}
        assert left == {first.id, third.id}, "the first was used later than the second"
    with configured(swap_node, max_store_bytes=1 << 20):
        pod = swap_node.kubelet.run_pod("source", [own_spec("none")], annotations=wishes())
        said(swap_node, pod.container().id[:12], "no room for the snapshot", "max_store_bytes")
        assert ask(pod, "/state")["nonce"]
        assert {path.name for path in swap_node.path(SNAPSHOTS).iterdir()} == left


def snapshot_of(node: Node, namespace: str, case: str) -> SnapshotRef:
    taken = captured(node, own_spec(case), namespace=namespace, annotations=wishes(case))
    taken.source.remove(grace_s=0)
    return taken


def snapshots(node: Node) -> set[str]:
    return {path.name for path in node.path(SNAPSHOTS).iterdir()}


@pytest.mark.attack("a pod keeps a snapshot from eviction by naming it, without ever fitting it")
def test_container_that_only_names_a_snapshot_does_not_keep_it(swap_node: Node) -> None:
    wipe_snapshots(swap_node)
    named = snapshot_of(swap_node, "default", "named")
    size = sum(named.manifest()["sizes"].values())
    pins = swap_node.kubelet.run_pod(
        "pins", [own_spec("another")], annotations={"quickthaw.io/restore": "named"}
    )
    first_answer(pins)
    assert_cold(pins.container())
    foreign = swap_node.kubelet.run_pod(
        "pins-too", [own_spec("named")], namespace="other",
        annotations={"quickthaw.io/restore": f"sha256:{named.id}"},
    )  # fmt: skip
    first_answer(foreign)
    with configured(swap_node, max_store_bytes=int(size * 1.5), evict_after_s=0.001):
        new = snapshot_of(swap_node, "default", "new")
    assert snapshots(swap_node) == {new.id}


@pytest.mark.attack("a namespace fills the node with snapshots, and those of others have to go")
def test_capture_evicts_snapshots_of_its_own_namespace(swap_node: Node) -> None:
    wipe_snapshots(swap_node)
    victims = snapshot_of(swap_node, "victim", "theirs")
    first = snapshot_of(swap_node, "greedy", "first")
    size = max(sum(each.manifest()["sizes"].values()) for each in (victims, first))
    with configured(swap_node, max_store_bytes=int(size * 2.5), evict_after_s=0.001):
        second = snapshot_of(swap_node, "greedy", "second")
        assert snapshots(swap_node) == {victims.id, second.id}, "theirs was not used for longer"
    with configured(swap_node, max_namespace_bytes=int(size * 1.5), evict_after_s=0.001):
        third = snapshot_of(swap_node, "greedy", "third")
        assert snapshots(swap_node) == {victims.id, third.id}


@pytest.mark.attack("A pod whose capture never happens has other tenants' snapshots removed")
@pytest.mark.parametrize("obstacle", ["quiesce", "stopped"])
def test_capture_that_never_happens_evicts_nothing(swap_node: Node, obstacle: str) -> None:
    wipe_snapshots(swap_node)
    taken = own_snapshot(swap_node, "stays")
    size = sum(taken.manifest()["sizes"].values())
    annotations = RESTORE | (
        {"quickthaw.io/quiesce": "exec:false"} if obstacle == "quiesce" else {}
    )
    with configured(swap_node, max_store_bytes=size + size // 2, evict_after_s=0.001):
        pod = swap_node.kubelet.run_pod("source", [own_spec("never")], annotations=annotations)
        first_answer(pod)
        if obstacle == "stopped":
            run_helper(pod.container(), "os.kill(os.getpid(), 19)\ntime.sleep(1000)")
            wait_until(lambda: "T" in states(pod.container()), "nothing is stopped", swap_node)
        assert swap_node.call([QUICKTHAW, "capture", "source"]).returncode != 0
        assert {path.name for path in swap_node.path(SNAPSHOTS).iterdir()} == {taken.id}


@contextlib.contextmanager
def own_disk(node: Node, size_bytes: int) -> Iterator[None]:
    """Gives the store a file system of its own, to which nobody else writes, in the `with`."""
    with node.daemon_stopped():
        options = f"size={size_bytes},mode=700"
        node.run(["mount", "-t", "tmpfs", "-o", options, "store", STORE])
    try:
        yield
    finally:
        node.kubelet.remove_pods()
        with node.daemon_stopped():
            node.run(["umount", "-l", STORE])


def with_a_file(pod: Pod, size: int = 48 << 20) -> None:
    ask(pod, f"/write?path=/var/big&size={size}&seed=1")
    ask(pod, "/ready")


@pytest.mark.attack(
    "A pod whose capture fails during its copy has other tenants' snapshots removed"
)
def test_full_disk_loses_snapshots_only_for_bytes_that_are_there(swap_node: Node) -> None:
    when = wishes(capture_when="signal")
    with own_disk(swap_node, 1 << 30):
        old = [
            captured(swap_node, own_spec(case), name=case, annotations=when, before=with_a_file)
            for case in ("old", "older")
        ]
        for each in old:
            each.source.remove(grace_s=0)
        disk = os.statvfs(swap_node.path(SNAPSHOTS))
        kept = disk.f_bavail * disk.f_frsize - (4 << 20)
        with (
            armed(swap_node, "capture.quiesced", "error"),
            configured(swap_node, keep_free_bytes=kept, evict_after_s=0.001),
        ):
            pod = swap_node.kubelet.run_pod("fails", [own_spec("new")], annotations=RESTORE)
            first_answer(pod)
            with_a_file(pod)
            assert swap_node.call([QUICKTHAW, "capture", "fails"]).returncode != 0
            assert snapshots(swap_node) == {each.id for each in old}, "nothing was copied"
            pod.remove(grace_s=0)
        with configured(swap_node, keep_free_bytes=kept, evict_after_s=0.001):
            new = captured(swap_node, own_spec("new"), annotations=when, before=with_a_file)
            left = snapshots(swap_node)
            assert new.id in left
            assert len(left) == 2, "a single snapshot left for it"
            disk = os.statvfs(swap_node.path(SNAPSHOTS))
            assert disk.f_bavail * disk.f_frsize >= kept


def states(container: Container) -> list[str]:
    return [procfs.state(pid) for pid in tree(container.host_pid)]


@pytest.mark.attack("A pod makes its capture look large, and other snapshots are removed for it")
def test_estimate_counts_shared_memory_once(swap_node: Node) -> None:
    """Nine processes share 64 MiB; counted for each process the estimate would be 600."""
    wipe_snapshots(swap_node)
    spec = probe(
        command=["python3", "-m", "workers.memory"], env={"SIZE_MIB": "64", "CHILDREN": "8"}
    )
    with configured(swap_node, max_snapshot_bytes=200 << 20):
        pod = swap_node.kubelet.run_pod("source", [spec], annotations=RESTORE)
        wait_until(
            lambda: first_answer(pod, "/health", within_s=60) is not None, "not ready", swap_node
        )
        swap_node.run([QUICKTHAW, "capture", "source"])
