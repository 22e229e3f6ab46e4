"""Programs that the daemon runs on behalf of a pod's author: whom they reach, and how they end."""

import contextlib
import os
import signal
from pathlib import Path
from typing import Final

import pytest

from tests.node.attacking import own_spec
from tests.node.kubelet import Pod
from tests.node.node import Node
from tests.node.swapping import first_answer, wait_until, wishes

pytestmark = pytest.mark.usefixtures("nothing_left")

PORT: Final = 8099
"""Nothing in a pod listens there."""
FORMS: Final = {
    "http": (f"http://:{PORT}/never", b"shim.workload.probe"),
    "tcp": (f"tcp://:{PORT}", b"shim.workload.probe"),
    "exec": ("exec:sleep 3600", b"\0exec\0"),
    "log": ("log:never", b"logwatch.py"),
}
"""`capture-when`, and a part of the command line of its helper."""
QUIET_S: Final = 3.0


def helpers(node: Node, word: bytes) -> dict[int, Path]:
    """Returns processes of the node's root whose command line has `word`, by their host pid."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
            if word in command and node._has(int(entry.name)):
                found[int(entry.name)] = entry
        except OSError:
            continue
    return found


def waiting_pod(node: Node, form: str) -> tuple[Pod, dict[int, Path]]:
    """Starts a pod that is never ready; returns it and the helper that checks its readiness."""
    condition, word = FORMS[form]
    pod = node.kubelet.run_pod(
        "waits", [own_spec(f"waits-{form}")], annotations=wishes(capture_when=condition)
    )
    first_answer(pod)
    wait_until(lambda: helpers(node, word), f"no helper for {condition}", node)
    return pod, helpers(node, word)


@pytest.mark.parametrize("form", FORMS)
def test_helper_ends_with_the_daemon_and_lacks_its_oom_protection(
    swap_node: Node, form: str
) -> None:
    """A killed daemon cannot end helpers; a node out of memory should end helpers early."""
    waiting_pod(swap_node, form)
    # A helper that started just now is still on its way.
    wait_until(lambda: scores(swap_node, form) >= {500}, "it is none of the first", swap_node)
    swap_node.kill_daemon()
    try:
        wait_until(
            lambda: not helpers(swap_node, FORMS[form][1]), "the helper goes on", swap_node
        )  # fmt: skip
    finally:
        for pid in helpers(swap_node, FORMS[form][1]):
            os.kill(pid, signal.SIGKILL)
        swap_node.start_daemon()


def scores(node: Node, form: str) -> set[int]:
    """Returns the OOM killer's scores of the helpers: 500; the daemon has -999."""
    found = set()
    for entry in helpers(node, FORMS[form][1]).values():
        with contextlib.suppress(OSError):
            found.add(int((entry / "oom_score_adj").read_text()))
    return found


@pytest.mark.attack("a probe is led into the node's network by a process that has its pod's number")
def test_helper_does_not_enter_a_process_that_took_over_the_pid(swap_node: Node) -> None:
    """The daemon hangs, the container ends, and its number becomes a process of the node."""
    pod, _ = waiting_pod(swap_node, "http")
    number, host_pid = pod.container().info()["pid"], pod.container().host_pid
    script = swap_node.path("/srv/reused.py")
    script.write_text(REUSED)
    os.kill(swap_node.daemon_pid, signal.SIGSTOP)
    try:
        os.kill(host_pid, signal.SIGKILL)
        wait_until(
            lambda: not Path(f"/proc/{host_pid}").exists(), "it does not end", swap_node
        )  # fmt: skip
        assert helpers(swap_node, FORMS["http"][1]), "the probe goes on: its daemon hangs"
        told = swap_node.run(["python3", "/srv/reused.py", str(number), str(PORT), str(QUIET_S)])
    finally:
        swap_node.kill_daemon()
        swap_node.start_daemon()
        script.unlink()
    assert told.strip() == "nobody asked", "a pod's author reached a server of the node"


REUSED: Final = r"""
import ctypes, os, signal, socket, struct, sys

number, port, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
server = socket.create_server(("127.0.0.1", port))
wanted = (ctypes.c_int * 1)(number)
# clone_args of clone3(2): the child has this number in our PID namespace.
fields = struct.pack("=11Q", 0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, ctypes.addressof(wanted), 1, 0)
arguments = ctypes.create_string_buffer(fields, len(fields))
libc = ctypes.CDLL(None, use_errno=True)
pid = libc.syscall(435, arguments, len(fields))
if pid == 0:
    signal.pause()
if pid != number:
    raise OSError(ctypes.get_errno(), "clone3")
server.settimeout(seconds)
try:
    print("asked:", server.accept()[0].recv(100))
except TimeoutError:
    print("nobody asked")
os.kill(pid, signal.SIGKILL)
os.waitpid(pid, 0)
"""
