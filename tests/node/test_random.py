"""Source, replicas and their forked children draw different random numbers.

The vDSO's getrandom keeps its state in the process. A restore multiplies the process as a fork
does: a state that came along would give every replica the same keys and ids.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.node import source
from tests.node.attacking import run_helper
from tests.node.kubelet import Container, Pod
from tests.node.node import Node
from tests.node.swapping import (
    RESTORE,
    ask,
    assert_restored,
    captured,
    first_answer,
    probe,
    wait_until,
    wipe_snapshots,
    wishes,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

DRAWS: Final = """
import ctypes, json, mmap, secrets, uuid
libc = ctypes.CDLL(None)

def drawn():
    buffer = ctypes.create_string_buffer(16)
    assert libc.getrandom(buffer, 16, 0) == 16
    return [os.urandom(16).hex(), secrets.token_hex(16), uuid.uuid4().hex, buffer.raw.hex()]

def of_child(find):
    reading, writing = os.pipe()
    if not os.fork():
        os.write(writing, json.dumps(find()).encode())
        os._exit(0)
    os.wait()
    os.close(writing)
    with os.fdopen(reading) as file:
        return json.load(file)

MADV_WIPEONFORK = 18
page = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
page.madvise(MADV_WIPEONFORK)

def read():
    return bytes(page[:6]).decode()

page[:6] = b"seeded"
drawn()
advice = {}
for name in ("DONTFORK", "DONTDUMP", "MERGEABLE", "HUGEPAGE", "NOHUGEPAGE", "RANDOM", "SEQUENTIAL"):
    area = mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(getattr(mmap, "MADV_" + name))
    advice[name] = (ctypes.addressof(ctypes.c_char.from_buffer(area)), area)
with open("/tmp/areas", "w") as file:
    found = {name: where for name, (where, _) in advice.items()}
    found["WIPEONFORK"] = ctypes.addressof(ctypes.c_char.from_buffer(page))
    json.dump(found, file)
os.rename("/tmp/areas", "/tmp/ready")
while True:
    if os.path.exists("/tmp/draw"):
        os.unlink("/tmp/draw")
        first = read()
        page[:6] = b"seeded"
        found = {"child": of_child(drawn), "self": drawn(), "first": first, "after": of_child(read)}
        with open("/tmp/part", "w") as file:
            json.dump(found, file)
        os.rename("/tmp/part", "/tmp/drawn")
    time.sleep(0.02)
"""
ZEROS: Final = "\0" * 6


@pytest.fixture(autouse=True, scope="module")
def no_snapshots_after_it(swap_node: Node) -> Iterator[None]:
    yield
    wipe_snapshots(swap_node)


def read_json(container: Container, name: str) -> Any:
    import json

    return json.loads(container.output(["cat", name]))


def drawing(pod: Pod) -> Any:
    """Have the helper draw; returns its findings."""
    container = pod.container()
    container.output(["sh", "-c", "rm -f /tmp/drawn; touch /tmp/draw"])
    wait_until(
        lambda: container.output(["sh", "-c", "ls /tmp"]).split().count("drawn"),
        "the helper does not draw", pod.node, within_s=30,
    )  # fmt: skip
    return read_json(container, "/tmp/drawn")


def helper_of(container: Container) -> int:
    """Returns the helper's process as the host numbers it."""
    (found,) = (
        pid for pid in source.members(container)
        if b"MADV_WIPEONFORK" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )  # fmt: skip
    return found


def flags(container: Container) -> dict[str, list[str]]:
    """Returns the kernel's flags of the areas with advice, and of all droppable areas."""
    places = {int(where): name for name, where in read_json(container, "/tmp/ready").items()}
    found: dict[str, list[str]] = {}
    name, droppable = "", 0
    for line in Path(f"/proc/{helper_of(container)}/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first:
            start, _, end = first.partition("-")
            inside = [
                each for where, each in places.items() if int(start, 16) <= where < int(end, 16)
            ]
            name = inside[0] if inside else ""
        elif first == "VmFlags:":
            words = sorted(word for word in rest.split() if word not in ("sd", "ac"))
            droppable += "dp" in words
            if name:
                found[name] = words
    return found | {"droppable": [str(droppable)]}


def test_source_replicas_and_children_draw_different_numbers(swap_node: Node) -> None:
    def prepare(pod: Pod) -> None:
        run_helper(pod.container(), DRAWS)
        wait_until(
            lambda: pod.container().output(["sh", "-c", "ls /tmp"]).split().count("ready"),
            "the helper does not begin", swap_node, within_s=30,
        )  # fmt: skip
        ask(pod, "/ready")

    taken = captured(swap_node, probe(), annotations=wishes(capture_when="signal"), before=prepare)
    wanted = flags(taken.source.container())
    assert wanted["droppable"] != ["0"], "the test's container has no state of the vDSO's getrandom"
    assert "wf" in wanted["WIPEONFORK"]
    pods = [swap_node.kubelet.run_pod(f"replica-{n}", [probe()], annotations=RESTORE) for n in "ab"]
    for pod in pods:
        first_answer(pod)
        assert_restored(pod.container())
    found = [drawing(pod) for pod in (taken.source, *pods)]
    numbers = [number for each in found for number in each["child"] + each["self"]]
    assert len(set(numbers)) == len(numbers) == 24, found
    assert found[0]["first"] == "seeded", "the source keeps its memory"
    assert [each["first"] for each in found[1:]] == [ZEROS, ZEROS], "replicas are told of the copy"
    assert [each["after"] for each in found] == [ZEROS] * 3, "children are told of the fork"
    assert [flags(pod.container()) for pod in pods] == [wanted, wanted]
    source.assert_sound(taken.source.container())
