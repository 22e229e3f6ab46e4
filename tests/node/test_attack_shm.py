"""What a neighbour in the pod does to /dev/shm, to reach the node through whoever fills it.

All containers of a pod share /dev/shm. The swap fills it, as root, while they run.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.node.attacking import SHARED, own_spec, shared_directory
from tests.node.kubelet import Container, Pod
from tests.node.node import Node
from tests.node.podspec import ContainerSpec
from tests.node.swapping import (
    ask,
    assert_restored,
    captured,
    first_answer,
    probe,
    wipe_snapshots,
    wishes,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

NEIGHBOUR: Final = 1000
ENTRIES: Final = 400
VICTIM: Final = f"{SHARED}/of-root-only"
POWERLESS: Final[dict[str, Any]] = {
    "user": NEIGHBOUR,
    "group": NEIGHBOUR,
    "drop_capabilities": ("ALL",),
    "no_new_privs": True,
}
NEIGHBOURS: Final[dict[str, dict[str, Any]]] = {
    "powerless": POWERLESS,
    "root of its container": {},
}


@pytest.fixture(autouse=True, scope="module")
def no_snapshots_after_it(swap_node: Node) -> Iterator[None]:
    with shared_directory(swap_node):
        yield
    wipe_snapshots(swap_node)


FIFOS: Final = f"""
import os
os.umask(0)
os.mkdir("/dev/shm/d", 0o755)
for number in range({ENTRIES}):
    os.mkfifo(f"/dev/shm/d/{{number}}", 0o600)
    os.chmod(f"/dev/shm/d/{{number}}", 0o4777)
os.chown("/dev/shm/d", {NEIGHBOUR}, {NEIGHBOUR})
"""

SWAPS: Final = f"""
import os, time
os.umask(0)
os.mkdir("/dev/shm/d", 0o755)
if not os.getuid():
    os.chown("/dev/shm/d", {NEIGHBOUR}, {NEIGHBOUR})
os.mkdir("/dev/shm/links", 0o755)
for number in range({ENTRIES} * 2):
    os.symlink("{VICTIM}", f"/dev/shm/links/{{number}}")
print("armed", flush=True)
left = list(range({ENTRIES} * 2))
def put_link(directory, name):
    if not left:
        return
    try:
        if not os.path.islink(f"{{directory}}/{{name}}"):
            os.rename(f"/dev/shm/links/{{left[-1]}}", f"{{directory}}/{{name}}")
            left.pop()
    except OSError:
        pass
def below(directory):
    try:
        return list(os.scandir(directory))
    except OSError:
        return []
until = time.monotonic() + 120
while time.monotonic() < until:
    for entry in below("/dev/shm/d"):
        if not entry.is_symlink():
            put_link("/dev/shm/d", entry.name)
    for top in below("/dev/shm"):
        if top.name.startswith("."):
            for entry in below(top.path):
                if not entry.is_symlink():
                    put_link(top.path, entry.name)
"""
"""Puts a link to a file of the node in the place of whatever appears, wherever it may."""


def with_neighbour(main: ContainerSpec, code: str, **power: Any) -> list[ContainerSpec]:
    """The containers of a pod; the neighbour is started first."""
    command = ["python3", "-c", code]
    return [probe(name="neighbour", command=command, env={"PORT": "8001"}, **power), main]


def attacked(node: Node, specs: list[ContainerSpec], snapshot: str) -> Pod:
    """A pod whose neighbour is at work already when `main` is restored."""
    annotations = {"quickthaw.io/restore.main": f"sha256:{snapshot}"}
    pod = node.kubelet.make_pod("victim", specs, annotations=annotations)
    pod.run_sandbox()
    for name in ("neighbour", "main"):
        pod.container(name).create()
        pod.container(name).start()
        if name == "neighbour":
            pod.container(name).wait_log("armed")
    first_answer(pod)
    return pod


def facts_of(path: Path) -> tuple[int, int, int, int, bytes]:
    """All that the attack could change of it."""
    status = path.stat()
    return status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, path.read_bytes()


def prepared_victim(node: Node) -> Path:
    path = node.path(VICTIM)
    path.write_text("root's alone")
    path.chmod(0o600)
    return path


@pytest.mark.attack("a neighbour in the pod changes a file of the node through fifos in /dev/shm")
@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_fifos_in_shm_that_become_links_change_no_file_of_the_node(
    swap_node: Node, neighbour: str
) -> None:
    def plant(pod: Pod) -> None:
        pod.container().output(["python3", "-c", FIFOS])
        ask(pod, "/ready")

    case = f"fifos {neighbour}"
    main = own_spec(case)
    taken = captured(swap_node, main, annotations=wishes(capture_when="signal"), before=plant)
    taken.source.remove(grace_s=0)
    path = prepared_victim(swap_node)
    before = facts_of(path)
    for _ in range(3):
        specs = with_neighbour(main, SWAPS, **NEIGHBOURS[neighbour])
        pod = attacked(swap_node, specs, taken.id)
        assert facts_of(path) == before, "the node's own file was changed"
        main_container = pod.container()
        if neighbour == "powerless":
            assert_restored(main_container)
        assert nothing_of_ours(main_container) == [], "what was made in between is gone"
        pod.remove(grace_s=0)


def nothing_of_ours(container: Container) -> list[str]:
    """Names in /dev/shm that only the swap itself can have made."""
    listed = container.output(["ls", "-A", "/dev/shm"]).split()
    return [name for name in listed if name.startswith(".quickthaw")]
