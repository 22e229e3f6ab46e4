"""Only snapshots that a trusted key has signed are restored; all others mean a cold start."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shim.contract import manifest as manifests
from shim.trust import keyfile, signature
from tests.node.kubelet import Pod
from tests.node.node import Node
from tests.node.podspec import ContainerSpec
from tests.node.swapping import (
    RESTORE,
    SNAPSHOTS,
    SnapshotRef,
    ask,
    assert_cold,
    assert_restored,
    captured,
    first_answer,
    lines_about,
    probe,
    published,
    said,
    wipe_snapshots,
    wishes,
)

on_a_node = pytest.mark.usefixtures("no_snapshots_after_it", "nothing_left", "keys_as_before")

KEYS = "/etc/quickthaw/keys"
FOREIGN = keyfile.make()


@pytest.fixture(scope="module")
def no_snapshots_after_it(swap_node: Node) -> Iterator[None]:
    yield
    wipe_snapshots(swap_node)


@pytest.fixture
def keys_as_before(swap_node: Node) -> Iterator[None]:
    """Undoes every change by a test to the keys of the node."""
    swap_node.run(["cp", "-a", KEYS, "/root/keys"])
    yield
    swap_node.run(["sh", "-c", f"rm -rf {KEYS} && mv /root/keys {KEYS}"])


def own_spec(case: str) -> ContainerSpec:
    """Returns a probe that no other case's snapshot fits."""
    return probe(env={"CASE": case})


def own_snapshot(node: Node, case: str) -> SnapshotRef:
    taken = captured(node, own_spec(case))
    taken.source.remove(grace_s=0)
    return taken


def start_pod(node: Node, case: str, annotations: dict[str, str] | None = None) -> Pod:
    pod = node.kubelet.run_pod("replica", [own_spec(case)], annotations=annotations or RESTORE)
    first_answer(pod)
    return pod


def starts_cold(node: Node, case: str, *told: str) -> None:
    """Assert that a pod starts cold, and that the journal gives the reason in a single line."""
    pod = start_pod(node, case)
    assert_cold(pod.container())
    said(node, pod.container().id[:12], "starts cold", "signature", *told)
    assert len(lines_about(node, pod.container())) == 1
    pod.remove(grace_s=0)


def starts_warm(node: Node, taken: SnapshotRef, case: str) -> None:
    """Assert that a pod is the captured process, come back."""
    pod = start_pod(node, case)
    assert_restored(pod.container())
    assert ask(pod, "/state")["nonce"] == taken.nonce
    pod.remove(grace_s=0)


def keys(node: Node, *arguments: str) -> dict[str, Any]:
    """Runs `quickthaw keys` on the node."""
    told: dict[str, Any] = json.loads(node.run(["quickthaw", "keys", *arguments, "--json"]))
    return told


def listed(node: Node, snapshot: str) -> dict[str, Any]:
    """Returns the snapshot's line of `quickthaw ls`."""
    rows = json.loads(node.run(["quickthaw", "ls", "--json"]))["snapshots"]
    row: dict[str, Any] = next(row for row in rows if row["id"] == snapshot)
    return row


def sign_again(node: Node, directory: Path, key: keyfile.PrivateKey) -> None:
    """Signs the snapshot as another node would have."""
    with node.daemon_stopped():
        found = manifests.decode((directory / "manifest.json").read_bytes())
        (directory / "manifest.sig").write_bytes(signature.sign(found, key).encode())


def node_key(node: Node) -> keyfile.PrivateKey:
    return keyfile.parse_private(node.path(f"{KEYS}/node.key").read_bytes())


def trust_foreign(node: Node) -> None:
    node.write("/root/node-7.pub", FOREIGN.public.pem().decode())
    assert keys(node, "trust", "/root/node-7.pub")["id"] == FOREIGN.public.id


@on_a_node
def test_snapshot_of_this_node_is_signed_and_restored(swap_node: Node) -> None:
    taken = own_snapshot(swap_node, "signed")
    (own,) = [key for key in keys(swap_node, "ls")["keys"] if key["role"] == "node"]
    assert signature.decode((taken.directory / "manifest.sig").read_bytes()).key == own["id"]
    assert listed(swap_node, taken.id)["state"] == "ready"
    assert f"by this node ({own['id']})" in swap_node.run(["quickthaw", "show", taken.id])
    starts_warm(swap_node, taken, "signed")


@on_a_node
@pytest.mark.attack("Someone rewrites the manifest of a snapshot in the store")
def test_rewritten_manifest_is_refused_by_its_signature(swap_node: Node) -> None:
    """The new id fits the new content: only the signature reveals the rewriting."""
    taken = own_snapshot(swap_node, "rewritten")
    before = manifests.decode((taken.directory / "manifest.json").read_bytes()).as_json()
    del before["created"]
    forged = manifests.build(**{**before, "timings": {"frozen": 0.0}})
    place = swap_node.path(f"{SNAPSHOTS}/{forged.id}")
    with swap_node.daemon_stopped():
        taken.directory.rename(place)
        (place / "manifest.json").write_bytes(forged.encode())
    starts_cold(swap_node, "rewritten", forged.id[:12], "it was changed")
    assert listed(swap_node, forged.id)["state"] == "untrusted"
    # The gain of the attack: nothing else than the signature stands in its way.
    sign_again(swap_node, place, node_key(swap_node))
    starts_warm(swap_node, taken, "rewritten")


@on_a_node
@pytest.mark.parametrize("what", ["changed", "another's"])
@pytest.mark.attack("Someone replaces a snapshot between the decision and the restore")
def test_snapshot_replaced_after_the_decision_is_not_restored(swap_node: Node, what: str) -> None:
    """The daemon has verified the signature and is done: the swap relies on the digest."""
    case = f"replaced-{what[0]}"
    taken = own_snapshot(swap_node, case)
    other = own_snapshot(swap_node, f"{case}-other") if what == "another's" else None
    pod = swap_node.kubelet.make_pod("replica", [own_spec(case)], annotations=RESTORE)
    pod.run_sandbox()
    container = pod.container()
    container.create()
    said(swap_node, container.id[:12], "is to start from snapshot")
    if other:
        taken.directory.rename(taken.directory.with_suffix(".away"))
        other.directory.rename(taken.directory)
    else:
        content = taken.manifest() | {"timings": {"frozen": 0.0}}
        (taken.directory / "manifest.json").write_text(json.dumps(content))
    container.start()
    assert first_answer(pod)["nonce"] not in (taken.nonce, other and other.nonce)
    assert_cold(container)
    said(swap_node, container.id[:12], "cannot", "manifest", "the container starts cold")
    said(swap_node, taken.id[:12], "goes to quarantine")
    pod.remove(grace_s=0)
    swap_node.run(["quickthaw", "rm", taken.id])  # and its quarantine record


@on_a_node
def test_unsigned_snapshot_is_replaced_by_a_new_snapshot(swap_node: Node) -> None:
    taken = own_snapshot(swap_node, "unsigned")
    with swap_node.daemon_stopped():
        (taken.directory / "manifest.sig").unlink()
    assert "the snapshot is not signed" in listed(swap_node, taken.id)["reason"]
    pod = start_pod(swap_node, "unsigned", wishes())
    assert_cold(pod.container())
    said(swap_node, pod.container().id[:12], "starts cold", "the snapshot is not signed")
    assert published(pod) != taken.id
    nonce = ask(pod, "/state")["nonce"]
    pod.remove(grace_s=0)
    again = start_pod(swap_node, "unsigned")
    assert_restored(again.container())
    assert ask(again, "/state")["nonce"] == nonce != taken.nonce


@on_a_node
def test_snapshot_of_another_node_is_used_while_its_key_is_trusted(swap_node: Node) -> None:
    taken = own_snapshot(swap_node, "foreign")
    sign_again(swap_node, taken.directory, FOREIGN)
    starts_cold(swap_node, "foreign", FOREIGN.public.id, "does not trust", "quickthaw keys trust")
    trust_foreign(swap_node)
    starts_warm(swap_node, taken, "foreign")
    assert keys(swap_node, "revoke", "node-7")["added"]
    starts_cold(swap_node, "foreign", FOREIGN.public.id, "revoked")


@on_a_node
def test_newer_untrusted_snapshot_is_skipped_and_reported(
    swap_node: Node,
) -> None:
    taken = own_snapshot(swap_node, "newer")
    with swap_node.daemon_stopped():
        before = manifests.decode((taken.directory / "manifest.json").read_bytes()).as_json()
        del before["created"]
        newer = manifests.build(**{**before, "created_at": taken.manifest()["created_at"] + 1})
        place = swap_node.path(f"{SNAPSHOTS}/{newer.id}")
        place.mkdir(mode=0o700)
        (place / "manifest.json").write_bytes(newer.encode())
        (place / "manifest.sig").write_bytes(signature.sign(newer, FOREIGN).encode())
    starts_warm(swap_node, taken, "newer")
    said(swap_node, "WARNING", newer.id[:12], "which is newer", FOREIGN.public.id)


@on_a_node
def test_snapshots_from_before_and_after_a_rotation_are_restored(swap_node: Node) -> None:
    old = own_snapshot(swap_node, "before")
    former = node_key(swap_node).public.id
    assert keys(swap_node, "rotate")["former"] == former
    starts_warm(swap_node, old, "before")
    new = own_snapshot(swap_node, "after")
    signer = signature.decode((new.directory / "manifest.sig").read_bytes()).key
    assert signer == node_key(swap_node).public.id != former
    starts_warm(swap_node, new, "after")
    keys(swap_node, "revoke", former)
    starts_cold(swap_node, "before", former, "revoked")
    starts_warm(swap_node, new, "after")


@on_a_node
def test_node_key_that_others_can_read_stops_captures_and_is_reported(swap_node: Node) -> None:
    swap_node.path(f"{KEYS}/node.key").chmod(0o644)
    pod = start_pod(swap_node, "readable", wishes())
    line = said(swap_node, pod.container().id[:12], "could not be signed", "chmod 0600")
    assert "the source goes on serving" in line
    assert first_answer(pod)["nonce"]


@on_a_node
def test_installation_makes_the_node_key_and_keeps_it(swap_node: Node) -> None:
    key = swap_node.path(f"{KEYS}/node.key")
    assert (key.stat().st_uid, key.stat().st_mode & 0o777) == (0, 0o600)
    assert swap_node.path(KEYS).stat().st_mode & 0o777 == 0o700
    before = key.read_bytes()
    swap_node.run(["/var/lib/dpkg/info/quickthaw.postinst", "configure", "0.0.1"], timeout_s=300)
    assert key.read_bytes() == before, "an upgrade never replaces it"


@pytest.mark.parametrize("suite", ["forky"])
def test_keys_outlive_the_package_and_go_when_it_is_purged(suite: str, deb: Path) -> None:
    with Node(suite) as node:
        node.install_deb(deb)
        key = node.path(f"{KEYS}/node.key")
        before = key.read_bytes()
        trust_foreign(node)
        node.run(["dpkg", "--remove", "quickthaw"])
        assert key.read_bytes() == before
        node.install_deb(deb)
        assert key.read_bytes() == before
        assert FOREIGN.public.id in [each["id"] for each in keys(node, "ls")["keys"]]
        # The test's node keeps the store on a file system of its own, which purging respects.
        node.run(["umount", "/var/lib/quickthaw"])
        node.run(["dpkg", "--purge", "quickthaw"])
        assert not node.path("/etc/quickthaw").exists()


@on_a_node
def test_daemon_makes_a_missing_node_key_at_its_start(swap_node: Node) -> None:
    with swap_node.daemon_stopped():
        swap_node.run(["rm", "-rf", KEYS])
    new = node_key(swap_node).public.id
    said(swap_node, "new key of this node", new)
    starts_warm(swap_node, own_snapshot(swap_node, "made"), "made")
