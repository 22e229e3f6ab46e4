"""A captured process has its Secrets in memory: a pod with another Secret is not restored
from it.
"""

from collections.abc import Iterator

import pytest

from tests.node.node import Node
from tests.node.podspec import ConfigMap, ContainerSpec, VolumeMount
from tests.node.swapping import (
    RESTORE,
    SNAPSHOTS,
    ask,
    assert_cold,
    assert_restored,
    captured,
    first_answer,
    probe,
    published,
    said,
    wipe_snapshots,
    wishes,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

IGNORE = {"quickthaw.io/volume-content": "ignore"}


@pytest.fixture(autouse=True, scope="module")
def no_snapshots_after_it(swap_node: Node) -> Iterator[None]:
    yield
    wipe_snapshots(swap_node)


def with_secret(password: str, kind: str = "secret") -> ContainerSpec:
    mounts = [VolumeMount("/etc/db", ConfigMap("db", {"password": password}, kind), read_only=True)]
    return probe(env={"CASE": f"content-{kind}"}, mounts=mounts)


@pytest.mark.attack(
    "a pod with another Secret of the same name starts from a process with the old one"
)
@pytest.mark.parametrize("kind", ["secret", "configmap", "projected"])
def test_snapshot_with_another_secret_behind_the_same_volume_does_not_fit(
    swap_node: Node, kind: str
) -> None:
    taken = captured(swap_node, with_secret("old", kind))
    taken.source.remove(grace_s=0)
    assert "old" not in (taken.directory / "manifest.json").read_text()
    like = swap_node.kubelet.run_pod("like", [with_secret("old", kind)], annotations=RESTORE)
    assert_restored(like.container())
    like.remove(grace_s=0)
    other = swap_node.kubelet.run_pod("other", [with_secret("new", kind)], annotations=RESTORE)
    first_answer(other)
    assert_cold(other.container())
    said(
        swap_node,
        f"({other.container().id[:12]}) starts cold",
        "volume_content",
        f"{kind} volume db",
    )
    other.remove(grace_s=0)
    careless = swap_node.kubelet.run_pod(
        "careless", [with_secret("new", kind)], annotations={**RESTORE, **IGNORE}
    )
    assert_restored(careless.container())
    careless.remove(grace_s=0)
    # The pod with the rotated Secret gets a snapshot of its own.
    pod = swap_node.kubelet.run_pod("rotated", [with_secret("new", kind)], annotations=wishes())
    new = published(pod)
    pod.remove(grace_s=0)
    for password, snapshot in (("new", new), ("old", taken.id)):
        pod = swap_node.kubelet.run_pod("each", [with_secret(password, kind)], annotations=RESTORE)
        assert_restored(pod.container())
        assert ask(pod, "/restored")["snapshot"] == snapshot
        pod.remove(grace_s=0)


def test_container_whose_secret_changed_before_the_capture_is_not_captured(swap_node: Node) -> None:
    before = len(list(swap_node.path(SNAPSHOTS).iterdir()))
    spec = with_secret("first")
    pod = swap_node.kubelet.run_pod("source", [spec], annotations=wishes(capture_when="signal"))
    first_answer(pod)
    current = pod.volume(spec.mounts[0].volume) / "..data"
    (current.parent / "..later").mkdir()
    (current.parent / "..later/password").write_text("second")
    (current.parent / "..data_tmp").symlink_to("..later")
    (current.parent / "..data_tmp").rename(current)
    ask(pod, "/ready")
    said(swap_node, pod.container().id[:12], "no snapshot was made", "volume has changed")
    assert len(list(swap_node.path(SNAPSHOTS).iterdir())) == before


@pytest.mark.attack("a worker with another uid reads the new pod's environment from restored.json")
def test_restored_json_is_readable_by_the_containers_user_alone(swap_node: Node) -> None:
    look = [
        "python3", "-c",
        "import os, sys; os.setgid(65534); os.setuid(65534)\n"
        "for path in ('/proc/1/environ', '/run/quickthaw/restored.json'):\n"
        "    try: print(len(open(path).read()) > 0)\n"
        "    except PermissionError: print('refused')",
    ]  # fmt: skip
    as_root = probe(env={"CASE": "told-root", "COLOR": "blue"})
    captured(swap_node, as_root).source.remove(grace_s=0)
    pod = swap_node.kubelet.run_pod("replica", [as_root], annotations=RESTORE)
    assert_restored(pod.container())
    assert pod.container().output(look).split() == ["refused", "refused"]
    assert ask(pod, "/restored")["environment"]["COLOR"] == "blue"
    file = swap_node.path(f"/run/quickthaw/control/{pod.container().id}/restored.json").stat()
    assert (file.st_uid, file.st_gid, file.st_mode & 0o777) == (0, 0, 0o400)
