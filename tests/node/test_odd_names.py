"""Names that are not text: a workload may give its threads, files and directories any bytes."""

from collections.abc import Iterator
from typing import Final

import pytest

from tests.node.attacking import own_spec, run_helper
from tests.node.kubelet import Container
from tests.node.node import Node
from tests.node.swapping import (
    ask,
    first_answer,
    probe,
    published,
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


def test_names_that_are_not_utf8_are_captured_and_restored(swap_node: Node) -> None:
    annotations = wishes(capture_when="signal")
    pod = swap_node.kubelet.run_pod("source", [own_spec("odd")], annotations=annotations)
    first_answer(pod)
    run_odd_helper(pod.container(), ODD)
    looks = ["sh", "-c", "cat /proc/[0-9]*/comm /proc/[0-9]*/task/*/comm | grep -ac odd"]

    def is_there() -> bool:
        return pod.container().exec(["test", "-e", "/srv/is-odd"]).exit_code == 0

    wait_until(is_there, "the helper does not run", swap_node, within_s=30)
    before = pod.container().output(looks)
    ask(pod, "/ready")
    published(pod)
    pod.remove(grace_s=0)
    replica = restored(swap_node, own_spec("odd"), annotations=annotations)
    assert replica.container().output(looks) == before, "threads have their names"
    assert ask(replica, "/count")["counter"] >= 1


def run_odd_helper(container: Container, code: str) -> None:
    """Run a helper that makes /srv/is-odd."""
    run_helper(container, code)

    def is_there() -> bool:
        return container.exec(["test", "-e", "/srv/is-odd"]).exit_code == 0

    wait_until(is_there, "the helper does not run", container.pod.node, within_s=20)


@pytest.mark.attack("A container maps a file with an odd name, and its neighbour is not captured")
def test_odd_name_of_a_neighbours_file_does_not_stop_a_capture(swap_node: Node) -> None:
    annotations = wishes(capture_when="signal")
    del annotations["quickthaw.io/snapshot"]
    annotations["quickthaw.io/snapshot.main"] = "auto"
    specs = [own_spec("neighbour"), probe(name="odd", env={"PORT": "8001"})]
    pod = swap_node.kubelet.run_pod("source", specs, annotations=annotations)
    first_answer(pod)
    run_odd_helper(pod.containers["odd"], ODD)
    run_odd_helper(pod.containers["main"], OWN)
    ask(pod, "/ready")
    assert published(pod)


OWN: Final = """
kept = open("/dev/shm/own", "w")
kept.write("shared" * 1000)
kept.flush()
open("/srv/is-odd", "w").close()
time.sleep(3600)
"""
ODD: Final = r"""
import mmap, threading
odd = b"\xff\xfe\r\xc3\x85odd"
name = lambda: ctypes.CDLL(None).prctl(15, odd, 0, 0, 0)
def thread():
    name()
    time.sleep(3600)
os.mkdir(b"/srv/" + odd)
os.chdir(b"/srv/" + odd)
kept = [open(b"/srv/" + odd + b"/kept", "wb+"), open(b"/srv/" + odd + b"/gone", "wb+")]
for each in kept:
    each.write(b"content" * 1000)
    each.flush()
os.unlink(b"/srv/" + odd + b"/gone")
mapped = mmap.mmap(kept[0].fileno(), 4096)
shm = open(b"/dev/shm/" + odd, "wb+")
shm.write(b"shared" * 1000)
shm.flush()
shared = mmap.mmap(shm.fileno(), 4096)
threading.Thread(target=thread, daemon=True).start()
name()
open("/srv/is-odd", "w").close()
time.sleep(3600)
"""
