"""Snapshots belong to a Kubernetes namespace: other namespaces learn nothing of them, and people
name the namespace.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.node.node import Node
from tests.node.swapping import (
    QUICKTHAW,
    STORE,
    assert_cold,
    assert_restored,
    captured,
    first_answer,
    probe,
    said,
    wipe_snapshots,
    wishes,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

NONE_EXISTS: Final = "e" * 64
"""An id that no snapshot has."""


@pytest.fixture(autouse=True, scope="module")
def no_snapshots_after_it(swap_node: Node) -> Iterator[None]:
    yield
    wipe_snapshots(swap_node)


def told_to(node: Node, wanted: str, secret: str) -> str:
    """Returns the journal's reason for the cold start of a pod of `curious` that names an id,
    without its own names.
    """
    annotations = {"quickthaw.io/restore": f"sha256:{wanted}"}
    spec = probe(env={"CASE": "tenant", "PASSWORD": secret})
    pod = node.kubelet.run_pod("asks", [spec], namespace="curious", annotations=annotations)
    first_answer(pod)
    assert_cold(pod.container())
    line = said(node, f"({pod.container().id[:12]}) starts cold: ")
    pod.remove(grace_s=0)
    return re.sub(rf"{wanted}|{wanted[:12]}", "ID", line.partition(" starts cold: ")[2])


@pytest.mark.attack("a pod asks by id what snapshots another namespace has, and what is in them")
def test_id_of_another_namespace_gets_the_answer_of_an_unknown_id(swap_node: Node) -> None:
    spec = probe(env={"CASE": "tenant", "PASSWORD": "correct"})
    taken = captured(swap_node, spec, namespace="victim")
    taken.source.remove(grace_s=0)
    answers = {
        (wanted, secret): told_to(swap_node, wanted, secret)
        for wanted in (taken.id, taken.id[:12], NONE_EXISTS, NONE_EXISTS[:12])
        for secret in ("correct", "guessed")
    }
    (answer,) = set(answers.values())
    assert "none has this id" in answer
    assert "Try one of" not in answer, "the namespace has none"
    swap_node.stop_daemon()
    swap_node.write(f"{STORE}/quarantine/{taken.id}.json", "{}")
    swap_node.start_daemon()
    assert told_to(swap_node, taken.id, "correct") == answer, "in quarantine it says no more"
    quickthaw(swap_node, "quarantine", "release", taken.id)
    named = {"quickthaw.io/restore": f"sha256:{taken.id}"}
    own = swap_node.kubelet.run_pod("own", [spec], namespace="victim", annotations=named)
    assert_restored(own.container())


def quickthaw(node: Node, *arguments: str) -> Any:
    return json.loads(node.run([QUICKTHAW, *arguments, "--json"]))


def test_command_refuses_a_name_of_two_namespaces_without_namespace(swap_node: Node) -> None:
    ids = {}
    for namespace in ("team-a", "team-b"):
        spec = probe(env={"CASE": "named"})
        taken = captured(swap_node, spec, namespace=namespace, annotations=wishes("warm"))
        taken.source.remove(grace_s=0)
        ids[namespace] = taken.id
    for verb in (["rm"], ["show"], ["verify"], ["quarantine", "release"]):
        done = swap_node.call([QUICKTHAW, *verb, "warm"])
        assert done.returncode == 40, (verb, done)
        wrote = done.stdout + done.stderr
        assert "team-a/warm" in wrote, (verb, wrote)
        assert "team-b/warm" in wrote, (verb, wrote)
    listed = {row["id"] for row in quickthaw(swap_node, "ls")["snapshots"]}
    assert set(ids.values()) <= listed, "nothing was removed"
    assert quickthaw(swap_node, "show", "team-a/warm")["manifest"]["id"] == ids["team-a"]
    with swap_node.daemon_stopped():
        found = quickthaw(swap_node, "show", "warm", "-n", "team-a")
        assert found["manifest"]["id"] == ids["team-a"]
    (row,) = quickthaw(swap_node, "verify", "warm", "-n", "team-b")["snapshots"]
    assert row["id"] == ids["team-b"]
    # A person who compares a pod means the snapshot of the pod's namespace.
    pod = swap_node.kubelet.run_pod(
        "compared", [probe(env={"CASE": "named"})], namespace="team-a",
        annotations={"quickthaw.io/restore": "warm"},
    )  # fmt: skip
    assert_restored(pod.container())
    told = quickthaw(swap_node, "explain", "team-a/compared", "--snapshot", "warm")
    assert told["snapshot"] == ids["team-a"]
    assert quickthaw(swap_node, "rm", "team-b/warm")["removed"] == [ids["team-b"]]
    pod.remove(grace_s=0)
    assert quickthaw(swap_node, "rm", "warm", "-n", "team-a")["removed"] == [ids["team-a"]]
