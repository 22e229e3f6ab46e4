"""Memory of a restored container: every byte comes back, and the container never runs with wrong
bytes.
"""

import ctypes
import mmap
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.node.kubelet import Pod
from tests.node.node import Node
from tests.node.pageserver import armed, processes, wait_filled
from tests.node.podspec import ContainerSpec
from tests.node.swapping import (
    QUICKTHAW,
    RESTORE,
    RUN,
    STORE,
    VERIFIED,
    SnapshotRef,
    answer,
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

MIB: Final = 128
SPEC: Final[ContainerSpec] = probe(
    command=["python3", "-m", "workers.memory"], env={"SIZE_MIB": str(MIB)}
)


@pytest.fixture(scope="module")
def snapshot(swap_node: Node) -> Iterator[SnapshotRef]:
    pod = swap_node.kubelet.run_pod("source", [SPEC], annotations=RESTORE)
    nonce = nonce_of(pod)
    ask(pod, "/touch?n=500&seed=7")
    pod.node.run([QUICKTHAW, "capture", "source"])
    taken = SnapshotRef(swap_node, published(pod), pod, nonce, 0.0)
    pod.remove(grace_s=0)
    yield taken
    wipe_snapshots(swap_node)


def nonce_of(pod: Pod) -> str:
    """Wait until the worker's memory is full; returns the worker's nonce."""
    first_answer(pod, "/health")
    wait_until(lambda: answer(pod, "/first").status == 200, "it is not full", pod.node)
    return str(ask(pod, "/first")["nonce"])


def start(node: Node) -> Pod:
    """Starts a pod from the snapshot, which may not be able to answer."""
    pod = node.kubelet.run_pod("replica", [SPEC], annotations=RESTORE)
    assert_restored(pod.container())
    return pod


def assert_killed_then_cold(pod: Pod, snapshot: SnapshotRef, why: str) -> None:
    """Assert that the container dies, events and journal report this, and kubelet starts it
    cold.
    """
    container = pod.container()
    status = container.wait_exit(30)
    assert status.exit_code == 128 + signal.SIGKILL
    assert not processes(container, "quickthaw-pages")
    assert not processes(container, "quickthaw-guard")
    container.restart()
    assert why in said(pod.node, "the memory could not be completed")
    assert not is_restored(container)
    assert nonce_of(pod) != snapshot.nonce


def test_every_byte_comes_back_and_the_page_server_ends(
    swap_node: Node, snapshot: SnapshotRef
) -> None:
    pod = start(swap_node)
    assert first_answer(pod, "/first")["ok"]
    whole = ask(pod, "/checksum")
    assert whole["ok"], whole
    assert ask(pod, "/state")["touched"] == 500
    wait_filled(pod.container())
    assert not processes(pod.container(), "quickthaw-guard")
    assert not swap_node.path(f"{RUN}/containers/{pod.container().id}/filling").exists()
    assert swap_node.path(f"{STORE}/working-sets/{snapshot.id}.json").exists()


def test_memory_not_hashed_since_boot_is_hashed_before_use(
    swap_node: Node, snapshot: SnapshotRef
) -> None:
    marks = swap_node.path(f"{VERIFIED}/{snapshot.id}/memory")
    marks.unlink()
    pod = start(swap_node)
    assert ask(pod, "/checksum")["ok"]
    wait_filled(pod.container())
    assert nonce_of(pod) == snapshot.nonce
    wait_until(marks.exists, "the memory got no marks", swap_node)


def test_killed_page_server_takes_the_container_with_it(
    swap_node: Node, snapshot: SnapshotRef
) -> None:
    with armed(swap_node, "memory.filling", "hang"):
        pod = start(swap_node)
    (server,) = processes(pod.container(), "quickthaw-pages")
    os.kill(server, signal.SIGKILL)
    assert_killed_then_cold(pod, snapshot, "the page server was killed")


def test_stuck_page_server_takes_the_container_with_it(
    swap_node: Node, snapshot: SnapshotRef
) -> None:
    with armed(swap_node, "memory.filling", "hang"):
        pod = start(swap_node)
    assert_killed_then_cold(pod, snapshot, "the page server did not move any more")


@pytest.mark.parametrize("action", ["kill", "hang", "error"])
def test_page_server_failure_before_the_end_of_restore_is_a_cold_start(
    swap_node: Node, snapshot: SnapshotRef, action: str
) -> None:
    with armed(swap_node, "memory.told", action):
        pod = swap_node.kubelet.run_pod(
            "replica", [SPEC], annotations=RESTORE | {"quickthaw.io/deadline": "2s"}
        )
    assert not is_restored(pod.container())
    assert nonce_of(pod) != snapshot.nonce
    assert not processes(pod.container(), "quickthaw-pages")
    assert not processes(pod.container(), "quickthaw-guard")


def test_memory_is_filled_while_the_daemon_is_down(swap_node: Node, snapshot: SnapshotRef) -> None:
    pod = start(swap_node)
    swap_node.kill_daemon()
    swap_node.start_daemon()
    assert ask(pod, "/checksum")["ok"]
    assert ask(pod, "/first")["nonce"] == snapshot.nonce
    wait_filled(pod.container())


def test_snapshot_is_read_ahead_from_sandbox_creation_on(
    swap_node: Node, snapshot: SnapshotRef
) -> None:
    """Image pull, network and reading overlap: see shim/daemon/prefetch."""
    data = snapshot.directory / "memory/space-1.data"
    evict(data)
    assert resident(data) < 0.5
    pod = swap_node.kubelet.make_pod("replica", [SPEC], annotations=RESTORE)
    pod.run_sandbox()
    wait_until(lambda: resident(data) == 1, "the memory is not read ahead", swap_node)


def evict(path: Path) -> None:
    """Evict a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(path: Path) -> float:
    """Returns the share of a file that is in the page cache. Source: mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    size = path.stat().st_size
    with path.open("rb") as file:
        address = libc.mmap(None, ctypes.c_size_t(size), 1, 1, file.fileno(), ctypes.c_long(0))
    pages = -(-size // mmap.PAGESIZE)
    there = (ctypes.c_ubyte * pages)()
    assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), there) == 0
    libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return sum(each & 1 for each in there) / pages


def test_page_server_ends_with_a_container_that_is_being_filled(
    swap_node: Node, snapshot: SnapshotRef
) -> None:
    began = time.monotonic()
    pod = start(swap_node)
    pod.remove(grace_s=0)
    wait_filled(pod.container())
    assert time.monotonic() - began < 20
    del snapshot
