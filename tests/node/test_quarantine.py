"""Snapshots that cannot be restored: taken out of use, listed, released, removed."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.node.kubelet import Pod
from tests.node.node import Node
from tests.node.pageserver import armed
from tests.node.podspec import ContainerSpec
from tests.node.swapping import (
    QUICKTHAW,
    RESTORE,
    SnapshotRef,
    assert_cold,
    assert_restored,
    captured,
    first_answer,
    probe,
    published,
    said,
    wait_until,
    wipe_snapshots,
    wishes,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

STORE = "/var/lib/quickthaw"


@pytest.fixture(autouse=True, scope="module")
def no_snapshots_after_it(swap_node: Node) -> Iterator[None]:
    yield
    wipe_snapshots(swap_node)


def own_spec(case: str) -> ContainerSpec:
    return probe(env={"CASE": f"quarantine-{case}"})


def own_snapshot(node: Node, case: str) -> SnapshotRef:
    taken = captured(node, own_spec(case))
    taken.source.remove(grace_s=0)
    return taken


def started(node: Node, case: str, annotations: dict[str, str] = RESTORE) -> Pod:
    pod = node.kubelet.run_pod("replica", [own_spec(case)], annotations=annotations)
    first_answer(pod)
    return pod


def quickthaw(node: Node, *arguments: str) -> Any:
    return json.loads(node.run([QUICKTHAW, *arguments, "--json"]))


@contextlib.contextmanager
def failing_criu(node: Node) -> Iterator[None]:
    """Replaces criu by a program that fails everything that runc asks of it."""
    own = node.run(["sh", "-c", "readlink -f $(command -v criu)"]).strip()
    path = node.path(own)
    real = path.with_name("criu.real")
    path.rename(real)
    path.write_text(f'#!/bin/sh\n[ "$1" = swrk ] && exit 1\nexec {own}.real "$@"\n')
    path.chmod(0o755)
    try:
        yield
    finally:
        real.rename(path)


def fails(node: Node, case: str) -> None:
    pod = started(node, case)
    assert_cold(pod.container())
    pod.remove(grace_s=0)


def in_quarantine(node: Node) -> dict[str, Any]:
    return {row["id"]: row for row in quickthaw(node, "quarantine", "ls")["quarantined"]}


def test_second_failure_quarantines_the_snapshot_and_release_resets_the_count(
    swap_node: Node,
) -> None:
    taken = own_snapshot(swap_node, "fails")
    counted = swap_node.path(f"{STORE}/health/{taken.id}.json")
    with armed(swap_node, "restore.criu.called", "error"):  # every restore that comes to CRIU
        fails(swap_node, "fails")
        wait_until(counted.exists, "the first failure is not counted", swap_node)
        assert in_quarantine(swap_node) == {}
        swap_node.kill_daemon()
        swap_node.start_daemon()
        fails(swap_node, "fails")
        said(swap_node, taken.id[:12], "goes to quarantine", "2 restores failed in a row")
    (row,) = in_quarantine(swap_node).values()
    assert (row["id"], row["failures"], row["damaged"]) == (taken.id, 2, False)
    assert row["error_class"] == "SwapFailed"
    # No pod tries the snapshot any more, and the daemon captures no like container.
    pod = started(swap_node, "fails", wishes())
    said(swap_node, f"({pod.container().id[:12]}) starts cold", "is in quarantine")
    said(swap_node, f"({pod.container().id[:12]}) is not captured", "quarantine release")
    pod.remove(grace_s=0)
    named = started(swap_node, "fails", {"quickthaw.io/restore": f"sha256:{taken.id}"})
    said(swap_node, f"({named.container().id[:12]}) starts cold", "is in quarantine")
    named.remove(grace_s=0)
    with swap_node.daemon_stopped():
        assert list(in_quarantine(swap_node)) == [taken.id], "read from the store itself"
    assert list(in_quarantine(swap_node)) == [taken.id], "and it outlives the daemon"
    assert quickthaw(swap_node, "quarantine", "release", taken.id[:12])["released"] == [taken.id]
    pod = started(swap_node, "fails")
    assert_restored(pod.container())
    assert first_answer(pod)["nonce"] == taken.nonce
    assert not counted.exists()


def test_failure_while_the_daemon_is_down_counts(swap_node: Node) -> None:
    taken = own_snapshot(swap_node, "away")
    with armed(swap_node, "restore.criu.called", "error"):  # every restore that comes to CRIU
        fails(swap_node, "away")
        pod = swap_node.kubelet.make_pod("replica", [own_spec("away")], annotations=RESTORE)
        pod.run_sandbox()
        pod.container().create()  # the ticket is written, and the daemon goes
        with swap_node.daemon_stopped():
            pod.container().start()
            first_answer(pod)
            pod.remove(grace_s=0)
        said(swap_node, "while quickthawd was away: default/replica/main")
        said(swap_node, taken.id[:12], "goes to quarantine")
    assert quickthaw(swap_node, "rm", taken.id[:12])["removed"] == [taken.id]
    assert in_quarantine(swap_node) == {}
    assert not os.listdir(swap_node.path(f"{STORE}/quarantine"))


def test_damaged_snapshot_is_quarantined_at_once_and_replaced(swap_node: Node) -> None:
    taken = own_snapshot(swap_node, "damaged")
    image = taken.directory / "criu" / "pages-1.img"
    os.truncate(image, image.stat().st_size // 2)
    pod = started(swap_node, "damaged", wishes())
    assert_cold(pod.container())
    said(swap_node, taken.id[:12], "goes to quarantine", "it is damaged", "pages-1.img")
    assert in_quarantine(swap_node)[taken.id]["damaged"]
    new = published(pod)
    assert new != taken.id, "a new one is captured"
    pod.remove(grace_s=0)
    assert_restored(started(swap_node, "damaged").container())
    states = {row["id"]: row["state"] for row in quickthaw(swap_node, "ls")["snapshots"]}
    assert (states[taken.id], states[new]) == ("quarantined", "ready")


def test_failure_of_the_pod_does_not_quarantine_the_snapshot(swap_node: Node) -> None:
    taken = own_snapshot(swap_node, "innocent")
    late = {**RESTORE, "quickthaw.io/deadline": "0.01s"}
    for _ in range(3):
        pod = started(swap_node, "innocent", late)
        assert_cold(pod.container())
        said(swap_node, pod.container().id[:12], "deadline passed")
        pod.remove(grace_s=0)
    assert in_quarantine(swap_node).keys().isdisjoint({taken.id})
    assert_restored(started(swap_node, "innocent").container())


def test_broken_criu_of_the_node_blames_no_snapshot(swap_node: Node) -> None:
    taken = own_snapshot(swap_node, "criu")
    with failing_criu(swap_node):
        for _ in range(3):
            fails(swap_node, "criu")
    said(swap_node, "CRIU did not start")
    assert in_quarantine(swap_node).keys().isdisjoint({taken.id})
    assert_restored(started(swap_node, "criu").container())
