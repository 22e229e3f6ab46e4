"""Forked processes of a restored container share the memory that they shared before."""

from collections.abc import Iterator
from typing import Final

import pytest

from shim.kernel import procfs
from tests.node.kubelet import Container
from tests.node.node import Node
from tests.node.pageserver import armed, wait_filled
from tests.node.podspec import ContainerSpec
from tests.node.swapping import (
    QUICKTHAW,
    RESTORE,
    SnapshotRef,
    answer,
    ask,
    assert_restored,
    first_answer,
    is_restored,
    probe,
    published,
    wait_until,
    wipe_snapshots,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

MIB: Final = 128
CHILDREN: Final = 8
SPEC: Final[ContainerSpec] = probe(
    command=["python3", "-m", "workers.memory"],
    env={"SIZE_MIB": str(MIB), "CHILDREN": str(CHILDREN)},
)


@pytest.fixture(scope="module")
def snapshot(swap_node: Node) -> Iterator[tuple[SnapshotRef, list[float]]]:
    """Yields the snapshot, and the memory that its source needed, in MiB."""
    pod = swap_node.kubelet.run_pod("source", [SPEC], annotations=RESTORE)
    first_answer(pod, "/health")
    wait_until(lambda: answer(pod, "/first").status == 200, "it is not full", swap_node)
    assert ask(pod, "/children") == {"ok": True, "children": CHILDREN}
    # Some pages that are not shared any more, in the middle of shared pages.
    assert ask(pod, "/touch?n=100&seed=3")["touched"] == 100
    needed = needed_mib(pod.container())
    swap_node.run([QUICKTHAW, "capture", "source"])
    taken = SnapshotRef(swap_node, published(pod), pod, "", 0.0)
    pod.remove(grace_s=0)
    yield taken, needed
    wipe_snapshots(swap_node)


def needed_mib(container: Container) -> list[float]:
    """Returns the memory of each process, the least first; shared memory counts once in all."""
    (cgroup,) = container.pod.node.cgroups[0].rglob(f"*{container.id}*")
    pids = (cgroup / "cgroup.procs").read_text().split()
    return sorted(procfs.rollup(pid)["Pss_Anon"] / 2**20 for pid in pids)


def test_restored_family_needs_no_more_memory_than_its_source(
    swap_node: Node, snapshot: tuple[SnapshotRef, list[float]]
) -> None:
    taken, source = snapshot
    pod = swap_node.kubelet.run_pod("replica", [SPEC], annotations=RESTORE)
    assert_restored(pod.container())
    assert first_answer(pod, "/first")["ok"]
    wait_filled(pod.container())
    replica = needed_mib(pod.container())
    before, after = sum(source), sum(replica)
    print(f"{swap_node.suite}: {before:.1f} MiB in the source, {after:.1f} MiB in the replica")
    assert MIB < before < 2 * MIB
    # Memory of requests meanwhile: 2 to 5 MiB, once 12 beside all other tests.
    assert after < before * 1.1, (
        f"a part of what is shared was copied: MiB by process {source} in the source, {replica}"
    )
    stored = sum(path.stat().st_blocks * 512 for path in taken.directory.glob("*/*")) / 2**20
    assert stored < 2 * MIB, "what is shared is stored once"


def test_forked_processes_keep_their_own_pages(
    swap_node: Node, snapshot: tuple[SnapshotRef, list[float]]
) -> None:
    pod = swap_node.kubelet.run_pod("replica", [SPEC], annotations=RESTORE)
    assert_restored(pod.container())
    assert ask(pod, "/checksum")["ok"]
    assert ask(pod, "/state")["touched"] == 100, snapshot
    assert ask(pod, "/children") == {"ok": True, "children": CHILDREN}
    assert ask(pod, "/touch?n=200&seed=4")["touched"] == 200
    assert ask(pod, "/checksum")["ok"]
    assert ask(pod, "/children")["ok"], "what the parent writes is not seen by its children"


@pytest.mark.parametrize("action", ["kill", "hang"])
def test_failed_restore_of_a_family_leaves_nothing(
    swap_node: Node, snapshot: tuple[SnapshotRef, list[float]], action: str
) -> None:
    """Holds although CRIU's log does not name CRIU's tree: see shim/criu/mntns.py."""
    with armed(swap_node, "memory.told", action):
        pod = swap_node.kubelet.run_pod("replica", [SPEC], annotations=RESTORE)
    assert not is_restored(pod.container()), snapshot
    pod.remove(grace_s=0)
    left = [path.name for path in swap_node.path("/tmp").iterdir()]
    assert not [name for name in left if name.startswith(".criu.")], left
