"""No container is left frozen, neither by stopped and traced processes nor by a slow capture."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from protos import cri_pb2 as pb
from shim.contract.errors import CriuDumpFailed, NotCapturable, SourceHarmed
from shim.contract.paths import CONTAINER_WORK, CONTAINERS
from shim.kernel import procfs
from tests.node import source
from tests.node.attacking import mutant, run_helper
from tests.node.kubelet import Container, Pod
from tests.node.node import Node
from tests.node.swapping import (
    PREFIX,
    QUICKTHAW,
    RESTORE,
    SNAPSHOTS,
    ask,
    first_answer,
    probe,
    wait_until,
)
from tests.node.test_limits import stopped_criu, telling_criu

pytestmark = pytest.mark.usefixtures("nothing_left")

INSIDE: Final = b"Putting parasite blob"
"""From this line of its log on, CRIU has processes execute code of its own."""
FROZEN_AT_MOST_S: Final = 13.0
"""The estimate of a small worker, 10 s, and the time of a thaw on a loaded machine."""
ATTEMPTS: Final = 20
LOOKED: Final = "/run/quickthaw/looked"
HELPER: Final = """
with open("/tmp/helper", "w") as file:
    file.write(str(os.getpid()))
while True:
    time.sleep(0.05)
"""
TRACER: Final = """
import ctypes, sys
libc = ctypes.CDLL(None)
PTRACE_SEIZE = 0x4206
assert libc.ptrace(PTRACE_SEIZE, int(sys.argv[1]), None, None) == 0
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def no_snapshots_after_it(swap_node: Node) -> Iterator[None]:
    yield
    swap_node.run(["sh", "-c", f"{QUICKTHAW} rm $(ls {SNAPSHOTS}) || true"])


def with_helper(node: Node, name: str = "source", **annotations: str) -> tuple[Pod, int]:
    """Returns a pod with a second process, and that process as the host numbers it."""
    pod = node.kubelet.run_pod(name, [probe()], annotations=RESTORE | annotations)
    first_answer(pod)
    container = pod.container()
    run_helper(container, HELPER)
    init = container.host_pid

    def helper() -> list[int]:
        return [pid for pid in procfs.children(init) if pid in source.members(container)]

    wait_until(lambda: len(helper()) == 1, "there is no helper", node)
    return pod, helper()[0]


def capture(node: Node, name: str = "source") -> tuple[int, str, float]:
    """Ask for a capture; returns exit status, message, seconds."""
    began = time.monotonic()
    done = node.call([QUICKTHAW, "capture", name])
    return done.returncode, done.stderr, time.monotonic() - began


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


@contextlib.contextmanager
def watched(container: Container) -> Iterator[Callable[[], float]]:
    """Gives a function: how long the container was frozen at a stretch, inside of the `with`."""
    longest, ended = [0.0], threading.Event()

    def watch() -> None:
        since = time.monotonic()
        while not ended.wait(0.02):
            if source.frozen(container):
                longest[0] = max(longest[0], time.monotonic() - since)
            else:
                since = time.monotonic()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: longest[0]
    finally:
        ended.set()
        thread.join()


@pytest.mark.attack("A pod stops one of its processes, and its capture never ends")
def test_container_with_a_stopped_process_is_refused_by_name(swap_node: Node) -> None:
    pod, helper = with_helper(swap_node)
    stop(helper)
    before = source.settled(pod.container(), stopped=True)
    with watched(pod.container()) as frozen_s:
        status, told, _ = capture(swap_node)
        assert frozen_s() == 0
    assert status == NotCapturable.exit_code, told
    assert "(python3) is stopped" in told
    source.assert_unharmed(pod.container(), before, stopped=True)
    os.kill(helper, signal.SIGCONT)
    assert capture(swap_node)[0] == 0


def test_container_whose_process_quiesce_stops_is_refused_by_name(swap_node: Node) -> None:
    """The call to the workload is between the first check and the freeze."""
    stopping = {f"{PREFIX}quiesce": "exec:sh -c 'kill -STOP $(cat /tmp/helper)'"}
    pod, _ = with_helper(swap_node, **stopping)
    with watched(pod.container()) as frozen_s:
        status, told, _ = capture(swap_node)
        assert frozen_s() == 0
    assert status == NotCapturable.exit_code, told
    assert "(python3) is stopped" in told


def test_container_with_a_traced_process_is_refused_by_name(swap_node: Node) -> None:
    pod, helper = with_helper(swap_node)
    with traced(swap_node, helper), watched(pod.container()) as frozen_s:
        status, told, _ = capture(swap_node)
        assert frozen_s() == 0
        assert status == NotCapturable.exit_code, told
        assert "(python3) is traced by process" in told
    assert capture(swap_node)[0] == 0


@contextlib.contextmanager
def traced(node: Node, pid: int) -> Iterator[None]:
    """Lets a debugger of the node trace the process, which runs on."""
    number = str(number_in_node(pid))
    tracer = node.popen(["python3", "-c", TRACER, number], stdin=subprocess.PIPE)
    try:
        wait_until(lambda: procfs.status(pid)["TracerPid"] != "0",
                   "it is not traced", node)  # fmt: skip
        yield
    finally:
        tracer.communicate(b"")


def waits_after_the_look(text: str) -> str:
    """Mutates the product: a pause between its last check of the processes and the freeze."""
    line = "        standstill.check(self._source, own_freezer(self._source).pids())\n"
    assert text.count(line) == 1
    pause = (
        f"        open({LOOKED!r}, 'w').close()\n"
        f"        import os\n        while os.path.exists({LOOKED!r}): time.sleep(0.01)\n"
    )
    return text.replace(line, line + pause)


@pytest.mark.attack("A pod stops a process just before the freeze, and stands still for ever")
def test_process_stopped_in_the_last_moment_freezes_nothing_for_long(
    swap_node: Node,
) -> None:
    with mutant(swap_node, "shim/capture/dump.py", waits_after_the_look):
        pod, helper = with_helper(swap_node)
        nonce = ask(pod, "/state")["nonce"]
        found: list[tuple[int, str, float]] = []
        asking = threading.Thread(target=lambda: found.append(capture(swap_node)))
        with watched(pod.container()) as frozen_s:
            asking.start()
            looked = swap_node.path(LOOKED)
            wait_until(looked.exists, "it does not look", swap_node)
            stop(helper)
            wait_until(lambda: procfs.state(helper) == "T", "it does not stop", swap_node)
            looked.unlink()
            asking.join()
            longest_s = frozen_s()
    ((status, told, took_s),) = found
    print(f"{swap_node.suite}: frozen for {longest_s:.2f} s, {took_s:.2f} s in all: {told}")
    assert 1 < longest_s < FROZEN_AT_MOST_S, "the limit ends it, and not something else"
    assert status == CriuDumpFailed.exit_code, told
    assert "capture_timeout_s" not in told
    assert not source.wrong(source.look(pod.container()), stopped=True)
    assert ask(pod, "/state")["nonce"] == nonce
    os.kill(helper, signal.SIGCONT)
    assert capture(swap_node)[0] == 0, "the turn was given back, and CRIU has left nothing"
    assert ask(pod, "/state")["nonce"] == nonce


def dump_log(pod: Pod) -> Path:
    return pod.node.path(f"{CONTAINERS}/{pod.container().id}/{CONTAINER_WORK}/dump.log")


def is_in(log: Path, words: bytes) -> bool:
    return log.exists() and words in log.read_bytes()


def hung_capture(
    node: Node, stop_criu: Callable[[], int], log: Path, name: str = "source"
) -> tuple[int, tuple[int, str, float]]:
    """Ask for a capture whose CRIU `stop_criu` stops; returns CRIU's pid and the capture's outcome.

    Again, if CRIU was faster: `stop_criu` raises ProcessLookupError then.
    """
    for _ in range(ATTEMPTS):
        log.unlink(missing_ok=True)
        with ThreadPoolExecutor(1) as thread:
            asking = thread.submit(capture, node, name)
            with contextlib.suppress(ProcessLookupError):
                return stop_criu(), asking.result()
            status, told, _ = asking.result()
        assert status == 0, told
        node.run([QUICKTHAW, "rm", *os.listdir(node.path(SNAPSHOTS))])
    raise AssertionError(f"CRIU was faster {ATTEMPTS} times")


def number_in_node(pid: int) -> int:
    """Returns the number that a process of a container has for the daemon of its node."""
    rows = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    (numbers,) = (row.split()[1:] for row in rows if row.startswith("NSpid:"))
    return int(numbers[1])


def assert_fell(pod: Pod, helper: int, number: int, told: str) -> None:
    """Assert that the container or its helper ended with CRIU, as the error says, and nothing else
    happened. number: of the helper, for the daemon.
    """
    assert "no snapshot was made" in told
    assert not os.listdir(pod.node.path(SNAPSHOTS))
    if "the container ended during its capture" in told:
        wait_until(
            lambda: pod.container().status().state == pb.CONTAINER_EXITED, "it runs", pod.node
        )
        return
    assert f"process {number} of the node, one of the container's, ended" in told
    assert not Path(f"/proc/{helper}").exists() or procfs.state(helper) == "Z"
    assert ask(pod, "/state")["nonce"]
    assert not [each for each in source.wrong(source.look(pod.container())) if "frozen" in each]


@pytest.mark.parametrize("seen", [b"Seized task", INSIDE, b"Dumping pages"])
def test_hanging_criu_is_ended_with_the_frozen_window(swap_node: Node, seen: bytes) -> None:
    """Wherever CRIU hangs, the source goes on. CRIU's code may stay in it, but in no snapshot.

    Nobody can stop CRIU between two given instructions. If the stop hits a moment in which a
    process executes CRIU's code, that process ends with CRIU. Then nothing is published, and the
    error says so.
    """
    pod, helper = with_helper(swap_node)
    number = number_in_node(helper)
    nonce = ask(pod, "/state")["nonce"]
    log = dump_log(pod)
    with telling_criu(swap_node) as calls, watched(pod.container()) as frozen_s:
        hung, (status, told, took_s) = hung_capture(
            swap_node, lambda: stopped_criu(swap_node, calls, lambda: is_in(log, seen)), log
        )
        longest_s = frozen_s()
    print(f"{swap_node.suite}: {seen!r}: frozen {longest_s:.2f} s, {took_s:.2f} s in all: {told}")
    assert longest_s < FROZEN_AT_MOST_S
    assert took_s < FROZEN_AT_MOST_S + 5
    assert not Path(f"/proc/{hung}").exists(), "CRIU is still there"
    if status == SourceHarmed.exit_code:
        assert_fell(pod, helper, number, told)
        return
    assert status == CriuDumpFailed.exit_code, told
    assert ask(pod, "/state")["nonce"] == nonce
    left = source.wrong(source.look(pod.container()))
    assert all("CRIU left" in each for each in left), left
    status, told, _ = capture(swap_node)
    assert status == (NotCapturable.exit_code if left else 0), told
    assert ("has code of CRIU mapped" in told) == bool(left)
    assert ask(pod, "/state")["nonce"] == nonce


def stopped_inside(node: Node, pod: Pod, calls: Path, log: Path) -> int:
    """Stop CRIU while a process of the source executes CRIU's code; returns CRIU's pid.

    Raises ProcessLookupError if CRIU was faster.
    """
    members = source.members(pod.container())
    hung = stopped_criu(node, calls, lambda: is_in(log, b"Seized"))
    while not at_breakpoint(members):
        os.kill(hung, signal.SIGCONT)
        if is_in(log, b"Dumping finished"):
            raise ProcessLookupError
        os.kill(hung, signal.SIGSTOP)
        time.sleep(0.001)
    return hung


def at_breakpoint(pids: list[int]) -> bool:
    """Returns whether CRIU has one of the processes stopped in code that it had it execute.

    CRIU blocks all signals but SIGTRAP (and SIGKILL and SIGSTOP, which nobody can block) then.
    """
    for pid in pids:
        fields = procfs.status(pid)
        if fields["State"][0] == "t" and fields["SigBlk"] == "fffffffffffbfeef":
            return True
    return False


def kills_at_once(text: str) -> str:
    """Mutates the product: it kills a CRIU that hangs wherever CRIU is."""
    line = "before_kill=lambda pid: safepoint.stop(pid, pids)"
    assert text.count(line) == 1
    return text.replace(line, "before_kill=None")


def test_criu_that_hangs_inside_a_process_goes_on_to_a_safe_point(swap_node: Node) -> None:
    pod, _ = with_helper(swap_node)
    nonce = ask(pod, "/state")["nonce"]
    before = source.members(pod.container())
    with telling_criu(swap_node) as calls:
        hung, status, told = hung_inside(swap_node, pod, calls)
    assert status == CriuDumpFailed.exit_code, told
    assert not Path(f"/proc/{hung}").exists()
    assert ask(pod, "/state")["nonce"] == nonce
    assert source.members(pod.container()) == before
    found = source.wrong(source.look(pod.container()))
    assert all("CRIU left" in each for each in found), found


def test_process_that_ends_with_a_killed_criu_is_reported(swap_node: Node) -> None:
    """The product without the safe point. Not every such moment ends a process, but most do."""
    with mutant(swap_node, "shim/capture/checkpoint.py", kills_at_once):
        for name in ("first", "second", "third", "fourth", "fifth"):
            pod, helper = with_helper(swap_node, name)
            number, before = number_in_node(helper), source.members(pod.container())
            with telling_criu(swap_node) as calls:
                _, status, told = hung_inside(swap_node, pod, calls)
            if status == SourceHarmed.exit_code:
                assert_fell(pod, helper, number, told)
                return
            assert status == CriuDumpFailed.exit_code, told
            assert source.members(pod.container()) == before, "a process ended, and nobody says so"
            pod.remove(grace_s=0)
    raise AssertionError("no process ended with CRIU")


def hung_inside(node: Node, pod: Pod, calls: Path) -> tuple[int, int, str]:
    """Returns the pid of a CRIU that was stopped inside of a process, and the capture's outcome."""
    log, name = dump_log(pod), pod.spec.name
    hung, (status, told, _) = hung_capture(
        node, lambda: stopped_inside(node, pod, calls, log), log, name
    )
    return hung, status, told
