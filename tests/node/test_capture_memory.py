"""The memory of a captured container is consistent: of a single moment, whatever it does
meanwhile.
"""

import textwrap
import time
from collections.abc import Iterator

import pytest

from tests.node.kubelet import Pod
from tests.node.node import Node
from tests.node.podspec import ContainerSpec
from tests.node.swapping import (
    PROBE,
    RUN,
    SnapshotRef,
    ask,
    captured,
    restored,
    wait_until,
    wipe_snapshots,
    wishes,
)

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture(autouse=True, scope="module")
def no_snapshots_after_it(swap_node: Node) -> Iterator[None]:
    yield
    wipe_snapshots(swap_node)


WHEN_TOLD = wishes(capture_when="signal")
PAGES = 8192
PORTS = (8000, 8001)
"""Of two processes of a container; the second is a fork of the first."""
WRITER = """
    import mmap, os, random, threading, time
    from workers.serving import Identity, LineLog, Server

    PAGES = 8192
    pages = [mmap.mmap(-1, PAGES * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
             for _ in range(3)]
    port = 8000 if os.fork() else 8001
    words = [memoryview(each).cast("Q")[::512] for each in pages]
    done = {"steps": 0, "wrong": [], "grown": 0}

    def write():
        # Three places that say the same but for the moment between the writes.
        choose, number = random.Random(port), 0
        while True:
            page = choose.randrange(PAGES)
            seen = [each[page] for each in words]
            if len(set(seen)) > 1:
                done["wrong"].append([page, *seen])
            number += 1
            for each in words:
                each[page] = number
            done["steps"] = number
            if number % 1000 == 0:
                time.sleep(0.001)

    def grow():
        # Memory that comes and goes, and knows what it must be.
        held = []
        while True:
            size = random.randrange(1, 40) * 65536
            held.append((size % 251, bytearray([size % 251]) * size))
            if len(held) > 16:
                value, content = held.pop(random.randrange(16))
                if content.count(value) != len(content):
                    done["wrong"].append(["grown", value])
                done["grown"] += 1
            time.sleep(0.001)

    for work in (write, grow):
        threading.Thread(target=work, daemon=True).start()
    me = Identity("writer")
    routes = {"/state": lambda _: me.describe(), "/done": lambda _: done}
    Server("0.0.0.0", port, routes, LineLog(), me).start()
    threading.Event().wait()
"""


def writer() -> ContainerSpec:
    """Returns two processes that write to their memory all the time, and check the content."""
    program = 'printf %s "$PROGRAM" > /srv/writer.py; exec python3 /srv/writer.py'
    return ContainerSpec(
        PROBE, command=["sh", "-c", program], env={"PROGRAM": textwrap.dedent(WRITER)}
    )


def all_written(pod: Pod) -> None:
    """Wait until every page has been written, and say that the container is ready."""
    for port in PORTS:
        while ask(pod, "/done", port=port)["steps"] < 8 * PAGES:
            time.sleep(0.1)
    pod.node.path(f"{RUN}/control/{pod.container().id}/ready").touch()


def goes_on(pod: Pod, port: int) -> None:
    """Wait until each page has probably come by again, and all memory that comes and goes."""
    then = ask(pod, "/done", port=port)
    steps, grown = then["steps"] + 4 * PAGES, then["grown"] + 64

    def has() -> bool:
        now = ask(pod, "/done", port=port)
        return bool(now["steps"] > steps and now["grown"] > grown)

    wait_until(has, "the writer stands still", pod.node, within_s=30, every_s=0.1)


@pytest.fixture
def snapshot(swap_node: Node) -> SnapshotRef:
    """Returns a snapshot of the writing processes."""
    return captured(swap_node, writer(), annotations=WHEN_TOLD, before=all_written)


def test_memory_of_a_writing_process_is_captured_at_a_single_moment(
    swap_node: Node, snapshot: SnapshotRef
) -> None:
    began = {port: ask(snapshot.source, "/done", port=port) for port in PORTS}
    pod = restored(swap_node, writer(), annotations=WHEN_TOLD)
    assert ask(pod, "/state")["nonce"] == snapshot.nonce
    for each in (pod, snapshot.source):
        for port in PORTS:
            goes_on(each, port)
            assert ask(each, "/done", port=port)["wrong"] == []
    assert all(began[port]["wrong"] == [] for port in PORTS)


def test_pages_of_zeros_take_no_room_in_the_snapshot(swap_node: Node) -> None:
    program = """
        import mmap, threading
        from workers.serving import Identity, LineLog, Server
        size = 64 << 20
        zeros, half = (mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in "ab")
        for at in range(0, size, 4096):
            zeros[at] = 0
            half[at] = at // 4096 % 2
        me = Identity("zeros")
        ok = lambda _: {"ok": not any(zeros[::4096]) and sum(half[::4096]) == size // 8192}
        Server("0.0.0.0", 8000, {"/state": lambda _: me.describe(), "/check": ok,
               "/health": ok}, LineLog(), me).start()
        threading.Event().wait()
    """
    run = 'printf %s "$PROGRAM" > /srv/zeros.py; exec python3 /srv/zeros.py'
    spec = ContainerSpec(
        PROBE, command=["sh", "-c", run], env={"PROGRAM": textwrap.dedent(program)}
    )
    snapshot = captured(swap_node, spec)
    sizes = snapshot.manifest()["sizes"]
    assert 32 << 20 < sizes["memory"] < 52 << 20, "half of one area, and an interpreter"
    assert sum(path.stat().st_size for path in (snapshot.directory / "memory").iterdir()) < 60 << 20
    pod = restored(swap_node, spec)
    assert ask(pod, "/check")["ok"]
    assert ask(snapshot.source, "/check")["ok"]
