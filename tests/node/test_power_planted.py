"""What pods and their authors plant for the node's root to read, follow or open."""

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.node import containerd
from tests.node.attacking import (
    SHARED,
    own_spec,
    product_without,
    run_helper,
    shared_directory,
    start_victim,
)
from tests.node.node import Node
from tests.node.podspec import HostPath, VolumeMount
from tests.node.swapping import (
    answer,
    ask,
    assert_cold,
    assert_restored,
    captured,
    first_answer,
    published,
    said,
    wait_until,
    wipe_snapshots,
    wishes,
)

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture(autouse=True, scope="module")
def no_snapshots_after_it(swap_node: Node) -> Iterator[None]:
    with shared_directory(swap_node):
        yield
    wipe_snapshots(swap_node)


@pytest.mark.attack(
    "A pod replaces its open file in a volume by a link to a file that it may not open"
)
def test_a_link_in_a_volume_does_not_open_a_file_for_a_restored_process(swap_node: Node) -> None:
    """Its own file is replaced, after the capture, by a link to one that it may not open."""
    swap_node.run(["sh", "-c", f"""
        mkdir -p {SHARED}/own {SHARED}/secret && chmod 777 {SHARED}/own
        head -c 4096 /dev/zero >{SHARED}/secret/key && chown 1000 {SHARED}/secret/key
        chmod 600 {SHARED}/secret/key
    """])  # fmt: skip
    mounts = [
        VolumeMount("/own", HostPath(f"{SHARED}/own")),
        VolumeMount("/secret", HostPath(f"{SHARED}/secret")),
    ]
    fields: dict[str, Any] = {"mounts": mounts, "drop_capabilities": ["ALL"]}
    pod_annotations = wishes(capture_when="signal")
    source = swap_node.kubelet.run_pod(
        "source", [own_spec("link", **fields)], annotations=pod_annotations
    )
    first_answer(source)
    assert answer(source, "/write?path=/secret/key&size=1").status == 409, "it may not open it"
    ask(source, "/write?path=/own/file&size=4096&seed=1")
    ask(source, "/chmod?path=/own/file&mode=0o600")
    run_helper(source.container(), KEEPS_OPEN)
    wait_until(swap_node.path(f"{SHARED}/own/opened").exists, "nothing is open", swap_node)
    ask(source, "/ready")
    taken = published(source)
    source.remove(grace_s=0)
    fit = start_victim(swap_node, "link", fields, taken)
    assert_restored(fit.container())
    fit.remove(grace_s=0)
    swap_node.run(["ln", "-sf", "/secret/key", f"{SHARED}/own/file"])
    victim = start_victim(swap_node, "link", fields, taken)
    assert_cold(victim.container())
    said(swap_node, victim.container().id[:12], "volume_files", "/own/file")
    victim.remove(grace_s=0)
    secret = swap_node.path(f"{SHARED}/secret/key")
    assert b"attacked" not in secret.read_bytes()
    with product_without(swap_node, "volume_files", of_daemon=False):
        attacked = start_victim(swap_node, "link", fields, taken)
        assert_restored(attacked.container())
        wait_until(
            lambda: b"attacked" in secret.read_bytes(), "the attack is none", swap_node, within_s=10
        )


KEEPS_OPEN: Final = """
file = os.open("/own/file", os.O_RDWR)
os.close(os.open("/own/opened", os.O_CREAT | os.O_WRONLY))
while True:
    if os.stat("/own/file").st_uid:
        os.pwrite(file, b"attacked", 0)
    time.sleep(0.05)
"""


SPOOFED: Final = {
    "org.criu.config": f"{SHARED}/criu.conf",
    "io.kubernetes.cri.container-type": "sandbox",
    "quickthaw.io.snapshot": "auto",
    "run.oci.hooks.stdout": f"{SHARED}/hooks",
}
"""What a pod's author could hope that somebody reads."""


@pytest.mark.attack("A pod names files and CRIU options of the node in its annotations")
def test_a_pods_own_annotations_name_no_file_of_the_nodes(swap_node: Node) -> None:
    """Also where the administrator's containerd passes all annotations on to the OCI spec."""
    evil = swap_node.path(f"{SHARED}/criu.conf")
    evil.write_text("log-file /srv/power/written-by-criu\naction-script /srv/power/run\n")
    with all_annotations_passed(swap_node):
        annotations = wishes() | SPOOFED
        taken = captured(swap_node, own_spec("spoof"), annotations=annotations)
        taken.source.remove(grace_s=0)
        wanted = {"quickthaw.io/restore": f"sha256:{taken.id}"} | SPOOFED
        pod = swap_node.kubelet.run_pod("victim", [own_spec("spoof")], annotations=wanted)
        first_answer(pod)
        assert_restored(pod.container())
        spec = pod.container().info()["runtimeSpec"]["annotations"]
        assert spec["run.oci.hooks.stdout"], "containerd passes them on"
        ours = f"/run/quickthaw/containers/{pod.container().id}/criu.conf"
        assert spec["org.criu.config"] == ours
        pod.remove(grace_s=0)
    assert not swap_node.path(f"{SHARED}/written-by-criu").exists()


@contextlib.contextmanager
def all_annotations_passed(node: Node) -> Iterator[None]:
    """containerd's runtime table has `pod_annotations = ["*"]` inside of the `with`."""
    plain = containerd.Containerd.configure

    def configure(self: containerd.Containerd) -> None:
        plain(self)
        for path in ("/etc/containerd/config.toml", "/etc/containerd/conf.d/quickthaw.toml"):
            file = node.path(path)
            text = file.read_text() if file.exists() else ""
            if containerd.RUNTIME_TABLE in text:
                passed = 'pod_annotations = ["*"]\ncontainer_annotations = ["*"]'
                table = containerd.RUNTIME_TABLE
                file.write_text(text.replace(table, f"{table}\n{passed}"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(containerd.Containerd, "configure", configure)
        node.restart_containerd()
        yield
    node.restart_containerd()


@pytest.mark.attack("A container plants links, fifos and many files in its control directory")
def test_what_a_container_plants_in_its_control_directory_is_nothing(swap_node: Node) -> None:
    """Links, a fifo and a ticket where the node's own root writes and reads."""
    annotations = wishes(capture_when="signal") | {"quickthaw.io/on-restart": "restore"}
    target = swap_node.path("/etc/planted")
    target.write_text("untouched")
    pod = swap_node.kubelet.run_pod("source", [own_spec("plant")], annotations=annotations)
    first_answer(pod)
    pod.container().output(["python3", "-c", PLANT])
    said(swap_node, pod.container().id[:12], "captured as", within_s=30)
    pod.container().stop(grace_s=0)
    pod.container().restart()
    first_answer(pod)
    assert_restored(pod.container())
    assert ask(pod, "/restored")["container"] == "main"
    assert target.read_text() == "untouched"
    assert not list(swap_node.path("/run/quickthaw/tickets").iterdir())
    target.unlink()


PLANT: Final = """
import os
os.chdir("/run/quickthaw")
for name in ("restored.json", ".restored.json", "outcome.json", "x" * 200):
    os.symlink("/etc/planted", name)
os.mkdir("tickets")
os.symlink("/run/quickthaw/tickets", "containers")
os.mkfifo("fifo")
os.mkfifo("ready")
"""
