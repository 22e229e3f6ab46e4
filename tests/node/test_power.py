"""Power never comes with a snapshot: attacks on the installed product, on a real node.

Each attack captures a container that has something which the victim's pod does not ask for, and
names that snapshot in a pod without it. The gate must refuse it, by the names of its checks; and
with these checks taken out of the installed product the attack must succeed, measured on the
restored process: so it is those checks, and nothing else, that keep the power away.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from tests.node.kubelet import Container, Pod
from tests.node.node import Node
from tests.node.podspec import ContainerSpec, HostPath, VolumeMount
from tests.node.swapping import (
    SnapshotRef,
    answer,
    ask,
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

CHECKS: Final = "/usr/lib/quickthaw/shim/gate/checks.py"
COMMAND: Final = "/usr/lib/quickthaw/bin/quickthaw"
SHARED: Final = "/srv/power"
SYS_ADMIN: Final = 1 << 21


@pytest.fixture(autouse=True, scope="module")
def no_snapshots_after_it(swap_node: Node) -> Iterator[None]:
    swap_node.path(SHARED).mkdir(parents=True)
    swap_node.path(SHARED).chmod(0o777)
    yield
    wipe_snapshots(swap_node)
    swap_node.run(["rm", "-r", SHARED])


@contextlib.contextmanager
def product_without(node: Node, *codes: str) -> Iterator[None]:
    """The installed gate lacks these checks inside of the `with`: what an attacker dreams of."""
    source = node.path(CHECKS)
    compiled = list(source.parent.glob("__pycache__/checks.*"))
    kept = {path: path.read_bytes() for path in [source, *compiled]}
    assert all(f'"{code}"' in source.read_text() for code in codes)
    try:
        for path in compiled:  # unchecked: else it would be run as it is
            path.unlink()
        less = f"\nCHECKS = tuple(row for row in CHECKS if row.code not in {codes!r})\n"
        source.write_text(source.read_text() + less)
        restart_daemon(node)
        yield
    finally:
        for path in source.parent.glob("__pycache__/checks.*"):
            path.unlink()
        for path, content in kept.items():
            path.write_bytes(content)
        restart_daemon(node)


def restart_daemon(node: Node) -> None:
    node.stop_daemon()
    node.start_daemon()


def status_of(container: Container) -> dict[str, str]:
    """/proc/PID/status of its init, as the host sees it."""
    text = Path(f"/proc/{container.host_pid}/status").read_text()
    return {
        name: value.strip() for name, _, value in (row.partition(":") for row in text.split("\n"))
    }


def volume(path: str = SHARED, *, read_only: bool = False) -> VolumeMount:
    return VolumeMount("/data", HostPath(path), read_only=read_only)


@dataclass(frozen=True, slots=True)
class Attack:
    """strong: what the captured container has. weak: what the victim's pod asks for instead.

    codes: the checks that refuse it. gained: whether a restored container has the power.
    """

    name: str
    codes: tuple[str, ...]
    strong: dict[str, Any]
    weak: dict[str, Any]
    gained: Callable[[Pod], bool]
    of_strong: dict[str, Any] | None = None


def has(name: str, value: str) -> Callable[[Pod], bool]:
    return lambda pod: status_of(pod.container())[name].split()[0] == value


def writes(pod: Pod) -> bool:
    return answer(pod, "/write?path=/data/gained&size=1").status == 200


ATTACKS: Final = [
    Attack(
        "capabilities", ("capabilities", "seccomp"),
        {"add_capabilities": ["SYS_ADMIN"]}, {},
        lambda pod: bool(int(status_of(pod.container())["CapEff"], 16) & SYS_ADMIN),
    ),
    Attack("user", ("user", "process_user"), {}, {"user": 1000}, has("Uid", "0")),
    Attack("seccomp", ("seccomp",), {"seccomp": "Unconfined"}, {}, has("Seccomp", "0")),
    Attack(
        "no_new_privs", ("no_new_privs",), {}, {"no_new_privs": True}, has("NoNewPrivs", "0")
    ),
    Attack(
        "mount", ("mounts", "mounted"),
        {"mounts": [volume()]}, {"mounts": [volume(read_only=True)]}, writes,
    ),
    Attack(
        "tenant", ("key", "namespace"), {}, {}, lambda pod: bool(first_answer(pod)["nonce"]),
        {"namespace": "tenant-b"},
    ),
]  # fmt: skip


def own_spec(case: str, **fields: Any) -> ContainerSpec:
    """A probe that no other case's snapshot is for."""
    return probe(env={"CASE": case}, **fields)


def own_snapshot(node: Node, case: str, fields: dict[str, Any], **rest: Any) -> SnapshotRef:
    taken = captured(node, own_spec(case, **fields), **rest)
    taken.source.remove(grace_s=0)
    return taken


def start_victim(node: Node, case: str, fields: dict[str, Any], snapshot: str, **rest: Any) -> Pod:
    """A pod that names the snapshot, and answers."""
    annotations = {"quickthaw.io/restore": f"sha256:{snapshot}"}
    pod = node.kubelet.run_pod(
        "victim", [own_spec(case, **fields)], annotations=annotations, **rest
    )
    first_answer(pod)
    return pod


def explained(node: Node, pod: Pod, snapshot: str) -> tuple[int, dict[str, Any]]:
    """Exit status and answer of `quickthaw explain`."""
    argv = [COMMAND, "explain", f"default/{pod.spec.name}", "--snapshot", snapshot, "--json"]
    done = node.call(argv)
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_is_refused_by_its_checks_and_by_nothing_else(
    swap_node: Node, attack: Attack
) -> None:
    taken = own_snapshot(swap_node, attack.name, attack.strong, **attack.of_strong or {})
    victim = start_victim(swap_node, attack.name, attack.weak, taken.id)
    assert_cold(victim.container())
    assert first_answer(victim)["nonce"] != taken.nonce
    for code in attack.codes:
        said(swap_node, victim.container().id[:12], f"{code}: the snapshot has")
    status, told = explained(swap_node, victim, taken.id)
    assert (status, sorted(told["refused"])) == (1, sorted(attack.codes))
    victim.remove(grace_s=0)
    with product_without(swap_node, *attack.codes):
        attacked = start_victim(swap_node, attack.name, attack.weak, taken.id)
        assert_restored(attacked.container())
        assert first_answer(attacked)["nonce"] == taken.nonce
        assert attack.gained(attacked), "the attack is none: this test shows nothing"
        attacked.remove(grace_s=0)


def test_an_equal_pod_is_restored_with_the_same_power_and_no_more(swap_node: Node) -> None:
    fields = {"no_new_privs": True, "drop_capabilities": ["ALL"]}
    taken = own_snapshot(swap_node, "equal", fields)
    pod = start_victim(swap_node, "equal", fields, taken.id)
    assert_restored(pod.container())
    found = status_of(pod.container())
    assert int(found["CapEff"], 16) == int(found["CapBnd"], 16) == 0
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
    status, told = explained(swap_node, pod, taken.id)
    assert (status, told["refused"]) == (0, [])


# What a process, and not its spec, has


HELPER: Final = """
import ctypes, os, socket, sys, time
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
null = os.open("/dev/null", os.O_RDWR)
for fd in (0, 1, 2):
    os.dup2(null, fd)
"""
"""A process of `exec` that leaves it: it becomes a child of the container's init."""

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


def run_helper(container: Container, code: str) -> None:
    container.output(["python3", "-c", HELPER + code])


def session_keyring(pod: Pod) -> str:
    return str(ask(pod, "/read?path=/tmp/keyring").get("text") or "")


def test_a_restored_process_has_no_keyring_of_the_nodes(swap_node: Node) -> None:
    annotations = wishes(capture_when="signal")
    spec = own_spec("keyring", seccomp="Unconfined")
    source = swap_node.kubelet.run_pod("source", [spec], annotations=annotations)
    first_answer(source)
    run_helper(source.container(), KEYRING)
    wait_until(lambda: "_ses." in session_keyring(source), "it has no keyring", swap_node)
    ask(source, "/ready")
    taken = published(source)
    source.remove(grace_s=0)
    pod = start_victim(swap_node, "keyring", {"seccomp": "Unconfined"}, taken)
    assert_restored(pod.container())
    ours = f"_ses.{pod.container().id}"
    wait_until(
        lambda: session_keyring(pod).endswith(ours),
        "it possesses another session keyring",
        swap_node,
    )


def test_the_score_of_the_oom_killer_is_the_new_pods(swap_node: Node) -> None:
    taken = own_snapshot(swap_node, "oom", {"memory_limit_bytes": 256 << 20})
    pod = start_victim(swap_node, "oom", {}, taken.id)
    assert_restored(pod.container())
    score = Path(f"/proc/{pod.container().host_pid}/oom_score_adj").read_text()
    assert int(score) == 1000, "a burstable pod's snapshot must not spare a best-effort pod"


def test_a_process_from_outside_is_not_captured(swap_node: Node) -> None:
    """As a debugging container that shares the PID namespace leaves one behind."""
    annotations = wishes(capture_when="signal")
    pod = swap_node.kubelet.run_pod("source", [own_spec("outside")], annotations=annotations)
    nonce = first_answer(pod)["nonce"]
    pid = str(pod.container().info()["pid"])
    enter = ["nsenter", "-t", pid, "-m", "-p", "-n", "-i", "-u", "python3", "-c"]
    swap_node.run([*enter, f"{HELPER}time.sleep(1000)"])
    ask(pod, "/ready")
    said(swap_node, pod.container().id[:12], "no snapshot was made", within_s=30)
    line = said(swap_node, pod.container().id[:12], "cannot capture")
    assert "in another cgroup" in line or "which its spec does not give" in line
    assert ask(pod, "/state")["nonce"] == nonce


def test_a_file_of_another_root_is_not_captured(swap_node: Node) -> None:
    """A descriptor that another container handed over: its path means another file here."""
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
    said(swap_node, pod.container().id[:12], "cannot dump the process tree", within_s=10)
    assert ask(pod, "/state")["nonce"] == nonce


# What others can write


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
    with product_without(swap_node, "volume_files"):
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
