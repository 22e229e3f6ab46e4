"""Descriptors that a neighbour passes to a process: a snapshot hands none of their power on.

CRIU makes each descriptor again with root's power. The captured container has no capability, its
neighbour has some, and they share a volume with a UNIX socket.
"""

from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.node.attacking import (
    SHARED,
    mutant,
    own_spec,
    product_without,
    run_helper,
    shared_directory,
    start_victim,
)
from tests.node.kubelet import Pod
from tests.node.node import Node
from tests.node.podspec import HostPath, VolumeMount
from tests.node.swapping import (
    ask,
    assert_cold,
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

WEAK: Final[dict[str, Any]] = {
    "drop_capabilities": ["ALL"],
    "mounts": [VolumeMount("/data", HostPath(SHARED))],
}
FROM_0: Final = {"net.ipv4.ip_unprivileged_port_start": "0"}
FROM_1024: Final = {"net.ipv4.ip_unprivileged_port_start": "1024"}
NOT_ANSWERED: Final = "Can't get 1:16 opt"
"""CRIU before 4.2 on Linux 6.16 and later dumps no socket that another container has made."""
SERVED: Final = """
server = socket.socket(socket.AF_UNIX)
server.bind("/data/socket")
server.listen()
connection = server.accept()[0]
kept = socket.recv_fds(connection, 1, 1)
connection.close()
server.close()
os.unlink("/data/socket")
open("/data/got", "w").close()
time.sleep(1000)
"""
"""The part of the captured container: it keeps the received descriptor."""
GIVE: Final = """
import ctypes, os, socket, struct, time
from socket import *
{made}
client = socket(AF_UNIX)
while True:
    try:
        client.connect("/data/socket")
        break
    except OSError:
        time.sleep(0.05)
send_fds(client, [b"x"], [given if isinstance(given, int) else given.fileno()])
while not os.path.exists("/data/got"):
    time.sleep(0.05)
os.unlink("/data/got")
"""
PACKET: Final = "given = socket(AF_PACKET, SOCK_RAW, 0x300)"
PASSED: Final = [
    ("packet socket", PACKET, "AF_PACKET", "CAP_NET_RAW"),
    ("raw socket", "given = socket(AF_INET, SOCK_RAW, IPPROTO_UDP)", "type 3", "CAP_NET_RAW"),
    (
        "mark", "given = socket(AF_INET, SOCK_DGRAM)\ngiven.setsockopt(SOL_SOCKET, SO_MARK, 7)",
        "SO_MARK 7", "CAP_NET_ADMIN or CAP_NET_RAW",
    ),
    (
        "priority",
        "given = socket(AF_INET, SOCK_DGRAM)\ngiven.setsockopt(SOL_SOCKET, SO_PRIORITY, 7)",
        "SO_PRIORITY 7", "CAP_NET_ADMIN or CAP_NET_RAW",
    ),
    (
        "forced send buffer",
        "given = socket(AF_INET, SOCK_DGRAM)\ngiven.setsockopt(SOL_SOCKET, 32, 1 << 26)",
        "SO_SNDBUF", "CAP_NET_ADMIN",
    ),
    (
        "forced receive buffer",
        "given = socket(AF_UNIX, SOCK_DGRAM)\ngiven.setsockopt(SOL_SOCKET, 33, 1 << 26)",
        "SO_RCVBUF", "CAP_NET_ADMIN",
    ),
    (
        "low port", "given = socket(AF_INET)\ngiven.bind(('', 81))\ngiven.listen()",
        "port 81", "CAP_NET_BIND_SERVICE",
    ),
    (
        "TCP with a forced buffer",
        "given = socket(AF_INET)\ngiven.setsockopt(SOL_SOCKET, 33, 1 << 26)",
        "SO_RCVBUF", "CAP_NET_ADMIN",
    ),
    (
        "netlink groups", "given = socket(AF_NETLINK, SOCK_RAW, 12)\ngiven.bind((0, 1))",
        "groups of NETLINK_NETFILTER", "CAP_NET_ADMIN",
    ),
    (
        "in a queue",
        f"{PACKET}\nleft, right = socketpair(AF_UNIX)\nsend_fds(left, [b'x'], [given.fileno()])\n"
        "given = right",
        "AF_PACKET", "CAP_NET_RAW",
    ),
    (
        "TUN device",
        "import fcntl\nos.path.exists('/tmp/tun') or os.mknod('/tmp/tun', 0o20600, "
        "os.makedev(10, 200))\ngiven = os.open('/tmp/tun', os.O_RDWR)",
        "device c 10:200", "which its spec does not give",
    ),
    (
        "namespace", "given = os.open('/proc/self/ns/mnt', os.O_RDONLY)",
        "mnt:[", "a namespace that is not its own",
    ),
    ("vsock", "given = socket(AF_VSOCK)", "cannot dump the process tree", "criu"),
    (
        "userfaultfd", "given = ctypes.CDLL(None).syscall(323, 1)\nassert given > 0",
        "[userfaultfd]", "which no snapshot can hold",
    ),
    (
        "pidfd", "given = os.pidfd_open(1)",
        "pidfd", "",
    ),
    ("file", "given = os.open('/etc/passwd', os.O_RDONLY)", "cannot dump the process tree", ""),
    ("directory", "given = os.open('/', os.O_RDONLY)", "cannot dump the process tree", ""),
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def no_snapshots_after_it(swap_node: Node) -> Iterator[None]:
    with shared_directory(swap_node):
        yield
    wipe_snapshots(swap_node)


def with_passed(node: Node, case: str, made: str) -> tuple[Pod, str]:
    """Starts a pod with a container without power that keeps the descriptor of its neighbour."""
    mounts = [VolumeMount("/data", HostPath(SHARED))]
    neighbour = probe(
        name="giver", mounts=mounts, env={"PORT": "8001"}, add_capabilities=["NET_ADMIN"],
        seccomp="Unconfined",
    )  # fmt: skip
    annotations = {
        "quickthaw.io/snapshot.main": "auto",
        "quickthaw.io/capture-when": wishes(capture_when="signal")["quickthaw.io/capture-when"],
    }
    pod = node.kubelet.run_pod(
        "source", [own_spec(case, **WEAK), neighbour], annotations=annotations,
        sysctls=FROM_1024,
    )  # fmt: skip
    nonce = first_answer(pod)["nonce"]
    run_helper(pod.container(), SERVED)
    pod.container("giver").output(["python3", "-c", GIVE.format(made=made)])
    return pod, nonce


def with_helper(
    node: Node, case: str, fields: dict[str, Any], code: str, sysctls: dict[str, str]
) -> str:
    """Returns the snapshot of a pod with an additional process, which runs `code` and then makes
    /tmp/made.
    """
    annotations = wishes(capture_when="signal")
    pod = node.kubelet.run_pod(
        "source", [own_spec(case, **fields)], annotations=annotations, sysctls=sysctls
    )
    first_answer(pod)
    run_helper(pod.container(), code)
    wait_until(lambda: "made" in ask(pod, "/read?path=/tmp")["entries"], "it opened nothing", node)
    ask(pod, "/ready")
    taken = published(pod)
    pod.remove(grace_s=0)
    return taken


@pytest.mark.attack("a neighbour passes a socket, device or file that takes power to open")
@pytest.mark.parametrize("passed", PASSED, ids=lambda passed: passed[0])
def test_passed_descriptor_is_refused_by_name(
    swap_node: Node, passed: tuple[str, str, str, str]
) -> None:
    case, made, *words = passed
    pod, nonce = with_passed(swap_node, case, made)
    ask(pod, "/ready")
    line = said(swap_node, pod.container().id[:12], "no snapshot was made", within_s=30)
    assert NOT_ANSWERED in line or all(word in line for word in words), line
    assert ask(pod, "/state")["nonce"] == nonce


@pytest.mark.attack("a packet socket of a neighbour sends frames from a pod without power")
def test_packet_socket_comes_back_when_the_check_is_removed(swap_node: Node) -> None:
    def blind(text: str) -> str:
        line = "by_network = opened.check_images("
        assert text.count(line) == 1
        return text.replace(line, 'by_network = {"lowest_port": 0, "pings": False}  # ')

    with mutant(swap_node, "shim/capture/sequence.py", blind):
        pod, _ = with_passed(swap_node, "blind", PACKET)
        ask(pod, "/ready")
        if swap_node.suite == "trixie":
            said(swap_node, pod.container().id[:12], "no snapshot was made", NOT_ANSWERED)
            return
        taken = published(pod)
        pod.remove(grace_s=0)
    attacked = start_victim(swap_node, "blind", WEAK, taken)
    assert_restored(attacked.container())
    held = attacked.container().output(["cat", "/proc/net/packet"])
    assert len(held.splitlines()) > 1, "the attack is none: this test shows nothing"
    attacked.remove(grace_s=0)


LOW_PORT: Final = """
kept = socket.socket()
kept.bind(("", 81))
kept.listen()
open("/tmp/made", "w").close()
time.sleep(1000)
"""


@pytest.mark.attack("a process keeps a low port that only the captured pod's network gave it")
def test_low_port_that_the_new_pod_may_not_bind_is_a_cold_start(swap_node: Node) -> None:
    fields = {"drop_capabilities": ["ALL"]}
    taken = with_helper(swap_node, "port", fields, LOW_PORT, FROM_0)
    fit = start_victim(swap_node, "port", fields, taken, sysctls=FROM_0)
    assert_restored(fit.container())
    fit.remove(grace_s=0)
    victim = start_victim(swap_node, "port", fields, taken, sysctls=FROM_1024)
    assert_cold(victim.container())
    said(swap_node, victim.container().id[:12], "descriptors: the snapshot has", "1024")
    victim.remove(grace_s=0)
    with product_without(swap_node, "descriptors", of_daemon=False):
        attacked = start_victim(swap_node, "port", fields, taken, sysctls=FROM_1024)
        assert_restored(attacked.container())


ORDINARY: Final = """
import select
kept = [socket.socket(socket.AF_INET), socket.socket(socket.AF_INET6), socket.socketpair()]
kept[0].bind(("", 7001))
kept[1].bind(("::", 7002))
for each in kept[:2]:
    each.listen()
kept.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
kept[-1].bind(("127.0.0.1", 7003))
kept[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 30)
kept[-1].setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, 6)
kept.append(socket.socket(socket.AF_UNIX))
kept[-1].bind("/tmp/ordinary")
kept[-1].listen()
kept.append(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))
kept[-1].bind((0, 1))
kept += [select.epoll(), os.eventfd(0), os.memfd_create("ordinary"), os.pipe(), os.openpty()]
kept += [os.pidfd_open(os.getpid()), os.open("/tmp", os.O_RDONLY), os.open("/dev/null", os.O_RDWR)]
libc = ctypes.CDLL(None)
kept += [libc.timerfd_create(1, 0), libc.inotify_init1(0)]
kept.append(os.open("/proc/self/ns/net", os.O_RDONLY))
open("/tmp/made", "w").close()
time.sleep(1000)
"""


def test_descriptors_of_an_ordinary_server_are_captured_and_restored(swap_node: Node) -> None:
    fields = {"drop_capabilities": ["ALL"]}
    taken = with_helper(swap_node, "ordinary", fields, ORDINARY, {})
    victim = start_victim(swap_node, "ordinary", fields, taken)
    assert_restored(victim.container())
