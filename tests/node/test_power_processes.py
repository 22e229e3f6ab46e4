"""Power that processes have and their spec does not tell: none of it is captured or restored."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from shim.kernel import procfs
from tests.node import cgroups
from tests.node.attacking import (
    HELPER,
    SHARED,
    SYS_ADMIN,
    line_taken_out,
    mutant,
    own_snapshot,
    own_spec,
    run_helper,
    shared_directory,
    start_victim,
)
from tests.node.kubelet import Container, Pod
from tests.node.node import Node
from tests.node.podspec import HostPath, VolumeMount
from tests.node.swapping import (
    ask,
    assert_restored,
    first_answer,
    probe,
    published,
    said,
    wait_until,
    wipe_snapshots,
    wishes,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

"""The helper in the container reads its keyring every 0.05 s."""


@pytest.fixture(autouse=True, scope="module")
def no_snapshots_after_it(swap_node: Node) -> Iterator[None]:
    with shared_directory(swap_node):
        yield
    wipe_snapshots(swap_node)


KEYRING: Final = """
libc = ctypes.CDLL(None)
while True:
    text = ctypes.create_string_buffer(200)
    libc.syscall(250 if os.uname().machine == "x86_64" else 219, 6, -3, text, 200)
    with open("/tmp/keyring.new", "w") as file:
        file.write(text.value.decode())
    os.rename("/tmp/keyring.new", "/tmp/keyring")
    time.sleep(0.05)
"""


def session_keyring(pod: Pod) -> str:
    return str(ask(pod, "/read?path=/tmp/keyring").get("text") or "")


@pytest.mark.attack("A restored process looks for keys of the node in its session keyring")
def test_restored_process_has_no_keyring_of_the_node(swap_node: Node) -> None:
    annotations = wishes(capture_when="signal")
    spec = own_spec("keyring", seccomp="Unconfined")
    source = swap_node.kubelet.run_pod("source", [spec], annotations=annotations)
    first_answer(source)
    run_helper(source.container(), KEYRING)
    wait_until(lambda: "_ses." in session_keyring(source), "it has no keyring", swap_node)
    ask(source, "/ready")
    taken = published(source)
    source.remove(grace_s=0)
    fields = {"seccomp": "Unconfined"}
    pod = start_victim(swap_node, "keyring", fields, taken)
    assert_restored(pod.container())
    ours = f"_ses.{pod.container().id}"
    wait_until(lambda: session_keyring(pod).endswith(ours), "it has another keyring", swap_node)
    pod.remove(grace_s=0)
    without = line_taken_out("keyring.join_session(")
    with mutant(swap_node, "shim/criu/restore.py", without, of_daemon=False):
        attacked = start_victim(swap_node, "keyring", fields, taken)
        assert_restored(attacked.container())
        wait_until(
            lambda: session_keyring(attacked).endswith("_uid_ses.0"),
            "then it would have root's own", swap_node,
        )  # fmt: skip
        attacked.remove(grace_s=0)


def test_restored_process_has_the_oom_score_of_the_new_pod(swap_node: Node) -> None:
    def score() -> int:
        pod = start_victim(swap_node, "oom", {}, taken.id)
        assert_restored(pod.container())
        found = Path(f"/proc/{pod.container().host_pid}/oom_score_adj").read_text()
        pod.remove(grace_s=0)
        return int(found)

    taken = own_snapshot(swap_node, "oom", {"memory_limit_bytes": 256 << 20})
    assert score() == 1000, "a burstable pod's snapshot must not spare a best-effort pod"
    without = line_taken_out("_rescore(swap)")
    with mutant(swap_node, "shim/restore/steps.py", without, of_daemon=False):
        assert score() == 900


@pytest.mark.attack(
    "A process with more power than the spec gives joins the container before the capture"
)
def test_container_with_a_process_from_outside_is_not_captured(swap_node: Node) -> None:
    """A debugging container that shares the PID namespace leaves such a process behind.

    Without this check CRIU captures the process, with all its capabilities.
    """
    pod, nonce = with_a_stranger(swap_node)
    ask(pod, "/ready")
    line = said(swap_node, pod.container().id[:12], "no snapshot was made", within_s=30)
    assert "CAP_SYS_ADMIN" in line
    assert "which its spec does not give" in line
    assert ask(pod, "/state")["nonce"] == nonce
    pod.remove(grace_s=0)
    with mutant(swap_node, "shim/capture/dump.py", line_taken_out("excess.check(")):
        pod, nonce = with_a_stranger(swap_node)
        ask(pod, "/ready")
        taken = published(pod)
        pod.remove(grace_s=0)
        attacked = start_victim(swap_node, "outside", {"drop_capabilities": ["ALL"]}, taken)
        assert_restored(attacked.container())
        powers = [found["CapEff"] for found in statuses_in(attacked.container())]
        assert any(int(power, 16) & SYS_ADMIN for power in powers), powers
        attacked.remove(grace_s=0)


def with_a_stranger(node: Node) -> tuple[Pod, str]:
    """Starts a pod without capabilities; a process in its PID namespace has all."""
    spec = own_spec("outside", drop_capabilities=["ALL"])
    annotations = wishes(capture_when="signal")
    pod = node.kubelet.run_pod("source", [spec], annotations=annotations)
    nonce = first_answer(pod)["nonce"]
    pid = str(pod.container().info()["pid"])
    enter = ["nsenter", "-t", pid, "-m", "-p", "-n", "-i", "-u", "-C", "python3", "-c"]
    node.run([*enter, f"{HELPER}time.sleep(1000)"])
    # CRIU itself refuses a process of another cgroup: this process is in the container's, too.
    (stranger,) = [
        int(found["Pid"])
        for found in statuses_in(pod.container())
        if int(found["CapEff"], 16) & SYS_ADMIN and found["State"][0] != "Z"
    ]
    join_cgroups(stranger, of_pid=pod.container().host_pid)
    return pod, nonce


def join_cgroups(pid: int, *, of_pid: int) -> None:
    """Put a process into the cgroups of another process."""
    for controllers, path in procfs.cgroups(of_pid):
        for hierarchy in cgroups.hierarchies():
            has = set(hierarchy.options.split(",")) if hierarchy.version == 1 else {""}
            if set(controllers.split(",")) <= has:
                (hierarchy.mount_point / path.lstrip("/") / "cgroup.procs").write_text(str(pid))


def statuses_in(container: Container) -> list[dict[str, str]]:
    """Returns /proc/PID/status of each process in the container's PID namespace."""
    own = os.readlink(f"/proc/{container.host_pid}/ns/pid")
    found = []
    for pid in procfs.pids():
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/ns/pid") == own:
                found.append(procfs.status(pid))
    return found


@pytest.mark.attack("A process brings along a file of another root")
def test_descriptor_from_another_root_is_not_captured(swap_node: Node) -> None:
    """Another container handed the descriptor over: its path means another file here."""
    shared = VolumeMount("/data", HostPath(SHARED))
    annotations = wishes(capture_when="signal")
    specs = [
        own_spec("foreign", mounts=[shared]),
        probe(name="giver", mounts=[shared], env={"PORT": "8001"}),
    ]
    del annotations["quickthaw.io/snapshot"]
    annotations["quickthaw.io/snapshot.main"] = "auto"
    pod = swap_node.kubelet.run_pod("source", specs, annotations=annotations)
    nonce = first_answer(pod)["nonce"]
    run_helper(
        pod.container(),
        """
server = socket.socket(socket.AF_UNIX)
server.bind("/data/socket")
server.listen()
kept = socket.recv_fds(server.accept()[0], 1, 1)
server.close()
os.unlink("/data/socket")
open("/data/got", "w").close()
time.sleep(1000)
""",
    )
    give = """
import os, socket, time
client = socket.socket(socket.AF_UNIX)
while True:
    try:
        client.connect("/data/socket")
        break
    except OSError:
        time.sleep(0.05)
socket.send_fds(client, [b"x"], [os.open("/etc/passwd", os.O_RDONLY)])
while not os.path.exists("/data/got"):
    time.sleep(0.05)
os.unlink("/data/got")
"""
    pod.container("giver").output(["python3", "-c", give])
    ask(pod, "/ready")
    said(swap_node, pod.container().id[:12], "cannot dump the process tree")
    assert ask(pod, "/state")["nonce"] == nonce
