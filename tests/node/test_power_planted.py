"""Files that pods and their authors plant for the node's root to read, follow or open."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.node import containerd
from tests.node.attacking import (
    SHARED,
    mutant,
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
from tests.node.test_limits import configured

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture(autouse=True, scope="module")
def no_snapshots_after_it(swap_node: Node) -> Iterator[None]:
    with shared_directory(swap_node):
        yield
    wipe_snapshots(swap_node)


@pytest.mark.attack(
    "A pod replaces its open file in a volume by a link to a file that it may not open"
)
def test_link_in_a_volume_opens_no_file_for_a_restored_process(swap_node: Node) -> None:
    """After the capture a link to a forbidden file replaces the process's own file."""
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
        assert_cold(attacked.container())
        said(swap_node, attacked.container().id[:12], "leads over a link")
        attacked.remove(grace_s=0)
        without = no_second_look
        with mutant(swap_node, "shim/restore/steps.py", without, of_daemon=False):
            attacked = start_victim(swap_node, "link", fields, taken)
            assert_restored(attacked.container())
            wait_until(
                lambda: b"attacked" in secret.read_bytes(), "the attack is none", swap_node,
                within_s=30,
            )  # fmt: skip


def no_second_look(text: str) -> str:
    """Returns an edit for `mutant`: the swap does not hold the files, and CRIU does not ask."""
    line = "opened.watched(swap.captured, swap.spec, swap.ticket, swap.held)"
    assert text.count(line) == 1
    return text.replace(line, "None")


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
"""Annotations that a pod's author could hope for somebody to read."""


@pytest.mark.attack("A pod names files and CRIU options of the node in its annotations")
def test_annotations_of_a_pod_name_no_file_of_the_node(swap_node: Node) -> None:
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
    """Gives containerd's runtime table `pod_annotations = ["*"]` inside of the `with`."""
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
def test_planted_files_in_the_control_directory_have_no_effect(swap_node: Node) -> None:
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


OWN_MODE: Final = "/chmod?path=/own/file&mode=0o600"


def opened_in_a_volume(
    node: Node, case: str, fields: dict[str, Any], helper: str | None = None
) -> str:
    """Returns the snapshot of a pod that has /own/file open, which its user alone may open."""
    node.run(["sh", "-c", f"""
        rm -rf {SHARED}/own && mkdir -p {SHARED}/own && chmod 777 {SHARED}/own
    """])  # fmt: skip
    pod_annotations = wishes(capture_when="signal")
    source = node.kubelet.run_pod("source", [own_spec(case, **fields)], annotations=pod_annotations)
    first_answer(source)
    ask(source, "/write?path=/own/file&size=4096&seed=1")
    ask(source, OWN_MODE)
    run_helper(source.container(), helper or KEEPS_OPEN)
    wait_until(node.path(f"{SHARED}/own/opened").exists, "nothing is open", node)
    ask(source, "/ready")
    taken = published(source)
    source.remove(grace_s=0)
    return taken


OWN: Final[dict[str, Any]] = {
    "mounts": [VolumeMount("/own", HostPath(f"{SHARED}/own"))],
    "drop_capabilities": ["ALL"],
}


@pytest.mark.attack("another tenant's file is renamed to the name of one that a process had open")
def test_file_of_another_user_is_not_opened_instead_of_the_captured_file(swap_node: Node) -> None:
    taken = opened_in_a_volume(swap_node, "renamed", OWN)
    fit = start_victim(swap_node, "renamed", OWN, taken)
    assert_restored(fit.container())
    fit.remove(grace_s=0)
    theirs = swap_node.path(f"{SHARED}/own/file")
    swap_node.run(["sh", "-c", f"""
        head -c 4096 /dev/zero >{SHARED}/theirs && chown 1000 {SHARED}/theirs
        chmod 600 {SHARED}/theirs && mv {SHARED}/theirs {SHARED}/own/file
    """])  # fmt: skip
    victim = start_victim(swap_node, "renamed", OWN, taken)
    assert_cold(victim.container())
    said(swap_node, victim.container().id[:12], "volume_files", "/own/file belongs to 1000:0")
    victim.remove(grace_s=0)
    assert b"attacked" not in theirs.read_bytes()


@pytest.mark.attack("a fifo in the place of an open file blocks CRIU, and every other restore")
def test_fifo_in_the_place_of_an_open_file_blocks_no_restore(swap_node: Node) -> None:
    taken = opened_in_a_volume(swap_node, "fifo", OWN)
    swap_node.run(["sh", "-c", f"cd {SHARED}/own && rm file && mkfifo -m 600 file"])
    began = time.monotonic()
    victim = start_victim(swap_node, "fifo", OWN, taken)
    assert_cold(victim.container())
    assert time.monotonic() - began < 20
    said(swap_node, victim.container().id[:12], "volume_files", "is of another type")


@pytest.mark.attack("a file is renamed over an open one after quickthaw has looked at it")
@pytest.mark.parametrize("put", ["theirs", "alike"])
def test_rename_after_the_check_is_found_before_a_process_runs(swap_node: Node, put: str) -> None:
    """Without the check of the files that CRIU has opened, the process would write to the other
    file.
    """
    taken = opened_in_a_volume(swap_node, f"race {put}", OWN)
    owner = 1000 if put == "theirs" else 0
    swap_node.run(["sh", "-c", f"""
        head -c 4096 /dev/zero >{SHARED}/theirs && chown {owner} {SHARED}/theirs
        chmod 600 {SHARED}/theirs
    """])  # fmt: skip

    def racing(text: str) -> str:
        line = "    return Watch("
        assert text.count(line) == 1
        moved = f'    os.rename("{SHARED}/theirs", "{SHARED}/own/file")\n'
        return text.replace(line, moved + line)

    other = swap_node.path(f"{SHARED}/own/file")
    with mutant(swap_node, "shim/restore/opened.py", racing, of_daemon=False):
        victim = start_victim(swap_node, f"race {put}", OWN, taken)
        assert_cold(victim.container())
        said(
            swap_node, victim.container().id[:12], "is another file than the one that was compared"
        )
        victim.remove(grace_s=0)
    assert b"attacked" not in other.read_bytes()


@pytest.mark.attack("a pod's deadline of an hour holds a turn for an hour")
def test_restore_gives_its_turn_back_whatever_the_pods_deadline(swap_node: Node) -> None:
    reads = KEEPS_OPEN.replace("os.O_RDWR", "os.O_RDONLY").replace("os.pwrite", "len")
    taken = opened_in_a_volume(swap_node, "hold", OWN, reads)

    def blind(text: str) -> str:
        line = "    if wrong:"
        assert text.count(line) == 1
        return text.replace(line, "    if False:")

    swap_node.run(["sh", "-c", f"cd {SHARED}/own && rm file && mkfifo -m 600 file"])
    annotations = {"quickthaw.io/restore": f"sha256:{taken}", "quickthaw.io/deadline": "1h"}
    with (
        configured(swap_node, restore_hold_s=4.0, max_deadline_s=50.0),
        product_without(swap_node, "volume_files"),
        mutant(swap_node, "shim/restore/opened.py", blind, of_daemon=False),
    ):
        began = time.monotonic()
        pod = swap_node.kubelet.run_pod(
            "victim", [own_spec("hold", **OWN)], annotations=annotations
        )
        first_answer(pod)
        assert_cold(pod.container())
        assert 4 <= time.monotonic() - began < 20
        said(swap_node, "asks for 3600 s, max_deadline_s allows 50 s")
        said(swap_node, pod.container().id[:12], "4 s with a turn")
        pod.remove(grace_s=0)
