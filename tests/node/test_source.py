"""A capture does no harm to its source: needs, open objects and behaviour are as before."""

from collections.abc import Iterator
from typing import Final

import pytest

from shim.contract.errors import SourceHarmed
from tests.node import source
from tests.node.attacking import mutant
from tests.node.kubelet import Pod
from tests.node.node import Node
from tests.node.podspec import ContainerSpec, EmptyDir, VolumeMount
from tests.node.swapping import (
    PREFIX,
    QUICKTHAW,
    RESTORE,
    SNAPSHOTS,
    answer,
    ask,
    first_answer,
    probe,
    published,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

MIB: Final = 128
CHILDREN: Final = 8
LIMIT_MIB: Final = 400
SHM: Final = VolumeMount("/dev/shm", EmptyDir("shm", in_memory=True))


def worker(name: str, **fields: object) -> ContainerSpec:
    """Returns a container of a worker from tests/workers."""
    return probe(command=["python3", "-m", f"workers.{name}"], **fields)


FORKED: Final = worker("memory", env={"SIZE_MIB": str(MIB), "CHILDREN": str(CHILDREN)})
LIMITED: Final = worker(
    "memory",
    env={"SIZE_MIB": str(MIB), "CHILDREN": str(CHILDREN), "CASE": "limited"},
    memory_limit_bytes=LIMIT_MIB << 20,
)
WORKERS: Final[dict[str, ContainerSpec]] = {
    "probe": probe(),
    "forked": FORKED,
    "memory": worker("memory", env={"SIZE_MIB": "96"}),
    "half-zero": worker("memory", env={"SIZE_MIB": "96", "CONTENT": "half-zero"}),
    "anonymous": worker("memory", env={"SIZE_MIB": "64", "BACKING": "anonymous"}),
    "memfd": worker("memory", env={"SIZE_MIB": "64", "BACKING": "memfd"}),
    "shared": worker(
        "shared",
        env={"MEMFD_MIB": "16", "ANON_MIB": "16", "SYSV_MIB": "16", "SHM_MIB": "8"},
        mounts=(SHM,),
    ),
    "fork": worker("fork", mounts=(SHM,)),
    "storm": worker("storm", env={"SIZE_MIB": "24"}),
}
"""The workers that run in the probe's image; `make demo` checks its inference server."""


@pytest.fixture(autouse=True)
def no_snapshots_after_it(swap_node: Node) -> Iterator[None]:
    yield
    swap_node.run(["sh", "-c", f"{QUICKTHAW} rm $(ls {SNAPSHOTS}) || true"])


def settled(node: Node, spec: ContainerSpec) -> Pod:
    """Starts a pod that has become ready, and answers no request any more."""
    pod = node.kubelet.run_pod("source", [spec], annotations=RESTORE)
    first_answer(pod, "/state")
    wait_until(lambda: answer(pod, "/health").status == 200, "it is not ready", node, within_s=60)
    return pod


@pytest.mark.parametrize("name", list(WORKERS))
def test_source_is_the_same_after_a_capture(swap_node: Node, name: str) -> None:
    pod = settled(swap_node, WORKERS[name])
    before = source.settled(pod.container())
    swap_node.run([QUICKTHAW, "capture", "source"])
    published(pod)
    source.assert_unharmed(pod.container(), before)
    nonce = ask(pod, "/state")["nonce"]
    # Once more: the bounds would hide lasting changes by the first capture.
    before = source.settled(pod.container())
    swap_node.run([QUICKTHAW, "capture", "source"])
    source.assert_unharmed(pod.container(), before)
    assert ask(pod, "/state")["nonce"] == nonce


@pytest.mark.attack("A workload that forks makes its capture use up the memory of its container")
def test_forked_processes_of_the_source_share_memory_after_a_capture(swap_node: Node) -> None:
    pod = settled(swap_node, LIMITED)
    before = source.settled(pod.container())
    needed = sum(each.memory["Pss_Anon"] for each in before.processes.values()) / 2**20
    assert MIB < needed < 2 * MIB
    swap_node.run([QUICKTHAW, "capture", "source"])
    after = source.settled(pod.container())
    now = sum(each.memory["Pss_Anon"] for each in after.processes.values()) / 2**20
    print(f"{swap_node.suite}: {needed:.1f} MiB before the capture, {now:.1f} MiB after it")
    source.assert_unharmed(pod.container(), before)
    assert ask(pod, "/children") == {"ok": True, "children": CHILDREN}


@pytest.mark.attack("A process is killed for lack of memory while it is captured")
def test_capture_is_not_published_when_the_oom_killer_hit_the_source(swap_node: Node) -> None:
    spec = probe(env={"CASE": "killed"}, memory_limit_bytes=LIMIT_MIB << 20)
    hog = "sh -c 'python3 -c \"bytes([1]) * (600 << 20)\"; true'"
    annotations = {**RESTORE, f"{PREFIX}quiesce": f"exec:{hog}"}
    pod = swap_node.kubelet.run_pod("source", [spec], annotations=annotations)
    nonce = first_answer(pod)["nonce"]
    assert refused(swap_node, "the OOM killer killed 1 processes") == SourceHarmed.exit_code
    assert snapshots(swap_node) == set()
    source.assert_sound(pod.container())
    assert ask(pod, "/state")["nonce"] == nonce


def reads_pinned(text: str) -> str:
    """Mutates the product to its former fault: it reads all memory by pinning pages."""
    assert text.count("if self._is_shared(wanted, size):") == 1
    return text.replace("if self._is_shared(wanted, size):", "if not size:")


def test_capture_that_kills_its_source_is_not_published(swap_node: Node) -> None:
    """With the fault put back that led to kills: the processes' limit is used up."""
    with mutant(swap_node, "shim/kernel/othermemory.py", reads_pinned):
        pod = settled(swap_node, LIMITED)
        assert refused(swap_node, "") != 0, "and the exit status tells where that was noticed"
        assert snapshots(swap_node) == set()
        assert source.killed(pod.container()) != 0


def refused(node: Node, why: str) -> int:
    """Ask for a capture that is refused; returns the exit status."""
    done = node.call([QUICKTHAW, "capture", "source"])
    assert why in done.stderr, done.stderr
    return done.returncode


def snapshots(node: Node) -> set[str]:
    return {path.name for path in node.path(SNAPSHOTS).iterdir()}
