"""A snapshot that differs from its capture in a single byte is not used: the pod starts cold."""

import ast
import contextlib
import json
import os
import shutil
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shim.kernel.inotify import Openings
from tests.node.flipping import flip_bit
from tests.node.kubelet import Pod
from tests.node.node import Node
from tests.node.podspec import ContainerSpec
from tests.node.swapping import (
    RESTORE,
    VERIFIED,
    SnapshotRef,
    ask,
    assert_cold,
    assert_restored,
    captured,
    first_answer,
    probe,
    said,
    wait_until,
    wipe_snapshots,
    wishes,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

SPEC: ContainerSpec = probe(env={"CASE": "integrity"})
MANY = 8 << 20


@pytest.fixture(scope="module")
def shared(swap_node: Node) -> Iterator[SnapshotRef]:
    """Yields a snapshot with files of its own in rootfs/ and shm/. Its source is gone."""

    def write(pod: Pod) -> None:
        ask(pod, "/write?path=/srv/small&size=5000&seed=1")
        ask(pod, f"/write?path=/srv/large&size={MANY}&seed=2")
        ask(pod, "/write?path=/dev/shm/segment&size=100000&seed=3")
        ask(pod, "/ready")

    taken = captured(swap_node, SPEC, annotations=wishes(capture_when="signal"), before=write)
    taken.source.remove(grace_s=0)
    yield taken
    wipe_snapshots(swap_node)


def start_pod(node: Node) -> Pod:
    pod = node.kubelet.run_pod("replica", [SPEC], annotations=RESTORE)
    first_answer(pod)
    return pod


@contextlib.contextmanager
def put_back(taken: SnapshotRef) -> Iterator[Path]:
    """Yields the snapshot's directory, and restores its content afterwards, except inode
    numbers.
    """
    saved = taken.directory.parent.parent / "saved"
    copy(taken.directory, saved)
    try:
        yield taken.directory
    finally:
        with taken.node.daemon_stopped():
            shutil.rmtree(taken.directory)
            copy(saved, taken.directory)
            shutil.rmtree(saved)
        taken.node.call(["quickthaw", "quarantine", "release", taken.id])


def copy(source: Path, target: Path) -> None:
    os.spawnlp(os.P_WAIT, "cp", "cp", "-a", "--sparse=always", str(source), str(target))


def make_setuid(path: Path) -> None:
    path.chmod(0o4755)


DAMAGES: tuple[tuple[str, Callable[[Path], object], str], ...] = (
    ("criu/pages-1.img", flip_bit, "criu/pages-1.img, chunk "),
    ("criu/inventory.img", flip_bit, "criu/inventory.img, chunk 0"),
    ("rootfs/srv/large", flip_bit, "rootfs/srv/large, chunk 1"),
    ("rootfs/srv/small", flip_bit, "rootfs/srv/small, chunk 0"),
    ("shm/segment", flip_bit, "shm/segment, chunk 0"),
    ("rootfs/srv/small", make_setuid, "rootfs/srv/small: expected mode 0o100644, found 0o104755"),
    ("rootfs/srv/added", Path.touch, "rootfs/srv/added: expected no such file, found a file"),
    ("criu/parent", Path.touch, "criu/parent: expected no such file, found a file"),
    (
        "rootfs/srv/small",
        Path.unlink,
        "rootfs/srv/small: expected the file as listed, found nothing",
    ),
    ("rootfs.tree", flip_bit, "rootfs.tree: expected SHA-256"),
)


@pytest.mark.parametrize(
    ("path", "damage", "why"), DAMAGES, ids=[f"{change.__name__}-{p}" for p, change, _ in DAMAGES]
)
@pytest.mark.attack("Someone changes, adds or removes a file of a snapshot in the store")
def test_changed_snapshot_is_refused_and_goes_to_quarantine(
    swap_node: Node, shared: SnapshotRef, path: str, damage: Callable[[Path], object], why: str
) -> None:
    with put_back(shared) as directory:
        damage(directory / path)
        pod = start_pod(swap_node)
        assert_cold(pod.container())
        assert ask(pod, "/state")["nonce"] != shared.nonce
        said(swap_node, pod.container().id[:12], why, "the container starts cold")


def verify(node: Node, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """Returns exit status and rows of `quickthaw verify`."""
    done = node.call(["quickthaw", "verify", "--json", *arguments])
    rows: list[dict[str, Any]] = json.loads(done.stdout)["snapshots"]
    return done.returncode, rows


def test_verify_reports_whole_and_damaged_snapshots(swap_node: Node, shared: SnapshotRef) -> None:
    status, (row,) = verify(swap_node, shared.id[:12])
    assert (status, row["result"], row["signature"]["state"]) == (0, "whole", "valid")
    assert row["hashed_bytes"] > MANY, "marks spare it nothing"
    with put_back(shared) as directory:
        flip_bit(directory / "rootfs/srv/large")
        status, (row,) = verify(swap_node)
        assert (status, row["result"]) == (24, "changed")
        assert "rootfs/srv/large, chunk 1" in row["reason"]
    assert verify(swap_node)[0] == 0


def test_unchanged_snapshot_is_restored_with_and_without_marks(
    swap_node: Node, shared: SnapshotRef
) -> None:
    marks = swap_node.path(f"{VERIFIED}/{shared.id}")
    shutil.rmtree(marks, ignore_errors=True)
    for _ in ("without marks", "with marks"):
        pod = start_pod(swap_node)
        assert_restored(pod.container())
        assert ask(pod, "/state")["nonce"] == shared.nonce
        # The page server marks the memory that it has filled, when all is there.
        wait_until(
            lambda: {"criu", "memory", "rootfs", "shm"} == {path.name for path in marks.iterdir()},
            "not everything got marks", swap_node,
        )  # fmt: skip
        swap_node.kubelet.remove_pods()


def test_daemon_makes_the_marks_again_after_a_boot(swap_node: Node, shared: SnapshotRef) -> None:
    marks = swap_node.path(f"{VERIFIED}/{shared.id}")
    stale = swap_node.path(f"{VERIFIED}/{'0' * 64}")
    with swap_node.daemon_stopped():
        shutil.rmtree(marks.parent)
        stale.mkdir(parents=True)
    wait_until((marks / "rootfs").exists, "no marks are made", swap_node, within_s=30)
    said(swap_node, "verified 1 snapshots")
    assert not stale.exists(), "nothing stays of a snapshot that is gone"
    pod = start_pod(swap_node)
    assert_restored(pod.container())


ROUNDS = 3


def steps_of(node: Node) -> tuple[float, float]:
    """Returns the seconds of the steps that check, and of the whole restore of a pod; removes the
    pod.
    """
    with start_pod(node) as pod:
        line = said(node, f"({pod.container().id[:12]}) restored from ")
    seconds, steps = line.partition(" in ")[2].split(" s ", 1)
    told = ast.literal_eval(steps)
    return told["check"] + told["hash"], float(seconds)


def test_verified_content_is_not_read_again(swap_node: Node, shared: SnapshotRef) -> None:
    marks = swap_node.path(f"{VERIFIED}/{shared.id}")
    large = str(shared.directory / "rootfs/srv/large")
    with_marks, without = [], []
    steps_of(swap_node)
    with contextlib.closing(Openings([large])) as openings:
        for _ in range(ROUNDS):
            made = (marks / "rootfs").stat().st_mtime_ns
            with_marks.append(steps_of(swap_node))
            assert (marks / "rootfs").stat().st_mtime_ns == made, "nothing was hashed again"
            assert openings.opened() == [], "what was verified before is not read again"
            shutil.rmtree(marks)
            without.append(steps_of(swap_node))
            assert openings.opened() == [large], "without a mark it is read, once"
            wait_until((marks / "rootfs").exists, "what was hashed gets no mark", swap_node)
    for name, found in (("with marks", with_marks), ("without", without)):
        checks, wholes = zip(*found, strict=True)
        print(f"{swap_node.suite}, {name}: check {statistics.median(checks) * 1000:.1f} ms "
              f"({min(checks) * 1000:.1f} to {max(checks) * 1000:.1f}) of a restore's "
              f"{statistics.median(wholes) * 1000:.0f} ms")  # fmt: skip
