"""Very many deleted files that are open: they cost the node no memory at a restore."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from shim.kernel import procfs
from tests.node import source
from tests.node.attacking import own_spec, run_helper, start_victim
from tests.node.node import Node
from tests.node.swapping import (
    RUN,
    ask,
    assert_restored,
    first_answer,
    published,
    said,
    wait_until,
    wipe_snapshots,
    wishes,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

MIB: Final = 1 << 20
COUNT: Final = 500
KIB: Final = 1000
SMALL: Final = 480
SMALL_BYTES: Final = 60 << 10
EVERY_S: Final = 0.002
HOLDS: Final = """
kept = []
for number in range({count}):
    file = os.open(f"/srv/deleted-{{number}}", os.O_RDWR | os.O_CREAT)
    os.write(file, os.urandom({size}))
    os.unlink(f"/srv/deleted-{{number}}")
    kept.append(file)
os.close(os.open("/tmp/made", os.O_CREAT | os.O_WRONLY))
time.sleep(1000)
"""


@pytest.fixture(autouse=True, scope="module")
def no_snapshots_after_it(swap_node: Node) -> Iterator[None]:
    yield
    wipe_snapshots(swap_node)


class Peaks:
    """The most that /run/quickthaw/containers has, and that a quickthaw-runc has in memory."""

    def __init__(self, node: Node) -> None:
        self._node, self.run, self.runtime = node, 0, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> "Peaks":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.is_set():
            self.run = max(self.run, blocks_in(self._node.path(f"{RUN}/containers")))
            self.runtime = max([self.runtime, *map(resident, procfs.pids())])
            time.sleep(EVERY_S)


def blocks_in(directory: Path) -> int:
    found = 0
    for _, _, names, dirfd in os.fwalk(directory, onerror=None):
        for name in names:
            try:
                found += os.stat(name, dir_fd=dirfd, follow_symlinks=False).st_blocks * 512
            except FileNotFoundError:
                continue
    return found


def resident(pid: int) -> int:
    """Returns anonymous memory, in bytes, if the process is a quickthaw-runc."""
    try:
        if b"quickthaw/front.py" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            return 0
        return procfs.memory(pid).get("RssAnon", 0)
    except OSError:
        return 0


def with_deleted(node: Node, case: str, count: int, size: int) -> str:
    """Starts a ready pod that has so many deleted files open; returns its short id."""
    pod = node.kubelet.run_pod(
        "source", [own_spec(case)], annotations=wishes(capture_when="signal")
    )
    first_answer(pod)
    run_helper(pod.container(), HOLDS.format(count=count, size=size))
    wait_until(
        lambda: "made" in ask(pod, "/read?path=/tmp")["entries"], "it opened nothing", node,
        within_s=60,
    )  # fmt: skip
    ask(pod, "/ready")
    return pod.container().id[:12]


@pytest.mark.attack("500 deleted files of 1,000 KiB take 1 GB of the node's memory at a restore")
def test_open_deleted_files_take_no_memory_of_the_node_at_a_restore(swap_node: Node) -> None:
    with_deleted(swap_node, "deleted", COUNT, KIB << 10)
    (pod,) = swap_node.kubelet.pods
    taken = published(pod)
    pod.remove(grace_s=0)
    with Peaks(swap_node) as peaks:
        pod = start_victim(swap_node, "deleted", {}, taken)
    assert_restored(pod.container())
    print(f"{swap_node.suite}: {peaks.run / MIB:.1f} MiB in /run, {peaks.runtime / MIB:.1f} MiB "
          "in quickthaw-runc")  # fmt: skip
    assert peaks.run < 40 * MIB
    assert 0 < peaks.runtime < 80 * MIB


@pytest.mark.attack("deleted files below the size of a link are on the node's account for ever")
def test_small_deleted_files_are_on_the_account_of_the_container(swap_node: Node) -> None:
    """The node has their images twice while CRIU reads them; then only the container is charged."""
    with_deleted(swap_node, "small", SMALL, SMALL_BYTES)
    (pod,) = swap_node.kubelet.pods
    taken = published(pod)
    pod.remove(grace_s=0)
    with Peaks(swap_node) as peaks:
        pod = start_victim(swap_node, "small", {}, taken)
    assert_restored(pod.container())
    charged = source.charged(pod.container())
    left = blocks_in(swap_node.path(f"{RUN}/containers"))
    print(f"{swap_node.suite}: {peaks.run / MIB:.1f} MiB in /run, {peaks.runtime / MIB:.1f} MiB "
          f"in quickthaw-runc; later {left / MIB:.1f} MiB in /run, the container is charged with "
          f"{charged / MIB:.1f} MiB of files")  # fmt: skip
    assert peaks.run < 40 * MIB
    assert 0 < peaks.runtime < 80 * MIB
    assert left < 2 * MIB
    assert charged >= SMALL * SMALL_BYTES


@pytest.mark.attack("thousands of small deleted files take the node's memory at each restore")
def test_container_with_very_many_small_deleted_files_is_not_captured(swap_node: Node) -> None:
    short = with_deleted(swap_node, "many", 900, 40 << 10)
    said(swap_node, short, "no snapshot was made", "small images are", within_s=30)
