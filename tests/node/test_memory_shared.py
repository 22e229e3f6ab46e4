"""Shared memory of every kind comes back, filled by us while CRIU waits; or the pod starts cold."""

from collections.abc import Iterator
from typing import Final

import pytest

from tests.node.flipping import flip_bit
from tests.node.kubelet import Pod
from tests.node.node import Node
from tests.node.pageserver import armed, processes, wait_filled
from tests.node.podspec import ContainerSpec, EmptyDir, VolumeMount
from tests.node.swapping import (
    QUICKTHAW,
    RESTORE,
    VERIFIED,
    SnapshotRef,
    ask,
    assert_restored,
    first_answer,
    is_restored,
    probe,
    published,
    said,
    wait_until,
    wipe_snapshots,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

SIZES: Final = {
    "MEMFD_MIB": "32", "ANON_MIB": "24", "SYSV_MIB": "16", "SHM_MIB": "12", "GONE_MIB": "8",
    "FILE_MIB": "8",
}  # fmt: skip
SHM: Final = VolumeMount("/dev/shm", EmptyDir("shm", in_memory=True))
SPEC: Final[ContainerSpec] = probe(
    command=["python3", "-m", "workers.shared"], env=SIZES, mounts=(SHM,)
)


def full(pod: Pod) -> str:
    """Wait until the worker has written everything; returns its nonce."""
    wait_until(lambda: first_answer(pod, "/first")["ok"], "it is not full", pod.node)
    return str(ask(pod, "/first")["nonce"])


@pytest.fixture(scope="module")
def snapshot(swap_node: Node) -> Iterator[SnapshotRef]:
    pod = swap_node.kubelet.run_pod("source", [SPEC], annotations=RESTORE)
    nonce = full(pod)
    pod.node.run([QUICKTHAW, "capture", "source"])
    taken = SnapshotRef(swap_node, published(pod), pod, nonce, 0.0)
    assert ask(pod, "/check")["ok"]
    pod.remove(grace_s=0)
    yield taken
    wipe_snapshots(swap_node)


def assert_whole(pod: Pod, snapshot: SnapshotRef) -> None:
    assert_restored(pod.container())
    assert first_answer(pod, "/first")["nonce"] == snapshot.nonce
    found = ask(pod, "/check")
    assert found["ok"], found
    found = ask(pod, "/meet")
    assert found["ok"], found
    wait_filled(pod.container())
    assert not processes(pod.container(), "quickthaw-shm")


def test_every_kind_of_shared_memory_comes_back(swap_node: Node, snapshot: SnapshotRef) -> None:
    memory = snapshot.directory / "memory"
    data = sorted(memory.glob("shared-*.data"))
    assert len(data) == 4, data  # a memfd, a sealed memfd, anonymous memory, a segment
    # The snapshot does not store zeros: they are 32 MiB of 80.
    assert 46 << 20 < sum(path.stat().st_blocks * 512 for path in data) < 50 << 20
    pod = swap_node.kubelet.run_pod("replica", [SPEC], annotations=RESTORE)
    assert_whole(pod, snapshot)


def test_shared_memory_not_hashed_since_boot_is_hashed_before_use(
    swap_node: Node, snapshot: SnapshotRef
) -> None:
    marks = swap_node.path(f"{VERIFIED}/{snapshot.id}/memory")
    marks.unlink(missing_ok=True)
    pod = swap_node.kubelet.run_pod("replica", [SPEC], annotations=RESTORE)
    assert_whole(pod, snapshot)
    wait_until(marks.exists, "the memory got no marks", swap_node)


def test_restored_container_can_be_captured_and_restored_again(
    swap_node: Node, snapshot: SnapshotRef
) -> None:
    pod = swap_node.kubelet.run_pod("again", [SPEC], annotations=RESTORE)
    assert_whole(pod, snapshot)
    pod.node.run([QUICKTHAW, "capture", "again"])
    second = published(pod)
    pod.remove(grace_s=0)
    assert second != snapshot.id
    pod = swap_node.kubelet.run_pod(
        "replica", [SPEC], annotations={"quickthaw.io/restore": f"sha256:{second}"}
    )
    assert_restored(pod.container())
    assert ask(pod, "/check")["ok"]
    wait_filled(pod.container())
    pod.remove(grace_s=0)
    swap_node.run([QUICKTHAW, "rm", second])


def assert_cold(pod: Pod, snapshot: SnapshotRef) -> None:
    assert not is_restored(pod.container())
    assert full(pod) != snapshot.nonce
    assert ask(pod, "/check")["ok"]
    for name in ("quickthaw-shm", "quickthaw-pages", "quickthaw-guard"):
        assert not processes(pod.container(), name)


@pytest.mark.parametrize("action", ["kill", "error", "hang"])
def test_failed_filler_is_a_cold_start(swap_node: Node, snapshot: SnapshotRef, action: str) -> None:
    with armed(swap_node, "memory.shared", action):
        pod = swap_node.kubelet.run_pod(
            "replica", [SPEC], annotations=RESTORE | {"quickthaw.io/deadline": "3s"}
        )
    assert_cold(pod, snapshot)


def test_shared_memory_is_charged_to_the_container(swap_node: Node, snapshot: SnapshotRef) -> None:
    pod = swap_node.kubelet.run_pod("replica", [SPEC], annotations=RESTORE)
    assert_whole(pod, snapshot)
    used = pod.container().stats().memory.working_set_bytes.value
    assert used > 70 << 20


def test_damaged_shared_memory_is_a_cold_start_and_quarantines_the_snapshot(
    swap_node: Node, snapshot: SnapshotRef
) -> None:
    data = max(
        snapshot.directory.glob("memory/shared-*.data"), key=lambda path: path.stat().st_size
    )
    flip_bit(data, 5000)
    pod = swap_node.kubelet.run_pod("replica", [SPEC], annotations=RESTORE)
    assert_cold(pod, snapshot)
    said(swap_node, snapshot.id[:12], "goes to quarantine", "it is damaged", data.name)
