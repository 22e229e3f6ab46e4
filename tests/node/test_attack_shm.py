"""Attacks of a neighbour in the pod on /dev/shm, aimed at the node through the process that fills
it.

All containers of a pod share /dev/shm. The swap fills /dev/shm, as root, while they run.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.node.attacking import SHARED, line_taken_out, mutant, own_spec, shared_directory
from tests.node.kubelet import Container, Pod
from tests.node.node import Node
from tests.node.podspec import ContainerSpec
from tests.node.swapping import (
    RUN,
    ask,
    assert_restored,
    captured,
    first_answer,
    probe,
    published,
    restored,
    said,
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
"""Puts a link to a file of the node in the place of every file that appears."""


def with_neighbour(main: ContainerSpec, code: str, **power: Any) -> list[ContainerSpec]:
    """Returns the containers of a pod; the neighbour starts first."""
    command = ["python3", "-c", code]
    return [probe(name="neighbour", command=command, env={"PORT": "8001"}, **power), main]


def attacked(node: Node, specs: list[ContainerSpec], snapshot: str) -> Pod:
    """Starts a pod whose neighbour is at work already when `main` is restored."""
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
    """Returns everything of the file that the attack could change."""
    status = path.stat()
    return status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, path.read_bytes()


def prepared_victim(node: Node) -> Path:
    path = node.path(VICTIM)
    path.write_text("root's alone")
    path.chmod(0o600)
    return path


@pytest.mark.attack("a neighbour in the pod changes a file of the node through fifos in /dev/shm")
@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_link_that_replaces_fifo_in_shm_changes_no_file_of_the_node(
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
    """Returns names in /dev/shm that only the swap itself can have made."""
    listed = container.output(["ls", "-A", "/dev/shm"]).split()
    return [name for name in listed if name.startswith(".quickthaw")]


# Deleted files, which CRIU makes again by their names

DROPPED: Final = f"{SHARED}/dropped"
OWN_DIRECTORY: Final = f"""
import os
os.mkdir("/dev/shm/d", 0o755)
os.chown("/dev/shm/d", {NEIGHBOUR}, {NEIGHBOUR})
"""
SWAPS_DIRECTORY: Final = f"""
import os, time
print("armed", flush=True)
while not os.path.isdir("/dev/shm/d"):
    time.sleep(0.0005)
while True:
    try:
        os.rename("/dev/shm/d", "/dev/shm/was-d")
        break
    except PermissionError:  # root's still
        pass
os.symlink("{DROPPED}", "/dev/shm/d")
time.sleep(1000)
"""


def source_with_deleted(node: Node, case: str, *, path: str, mode: str = "") -> Pod:
    """Starts a container that keeps a file open whose name is gone, ready for its capture."""
    pod = node.kubelet.run_pod(
        "source", [own_spec(case)], annotations=wishes(capture_when="signal")
    )
    first_answer(pod)
    pod.container().output(["python3", "-c", OWN_DIRECTORY])
    ask(pod, f"/hold?name=gone&path={path}&size=8192&seed=1")
    if mode:
        ask(pod, f"/chmod?path={path}&mode={mode}")
    ask(pod, f"/delete?path={path}")
    ask(pod, "/ready")
    return pod


@pytest.mark.attack("a neighbour has CRIU make a deleted file in a directory of the node")
def test_deleted_file_in_shm_subdirectory_is_made_nowhere_on_the_node(
    swap_node: Node,
) -> None:
    source = source_with_deleted(swap_node, "ghost", path="/dev/shm/d/gone")
    line = said(swap_node, source.container().id[:12], "cannot capture a deleted file", within_s=30)
    assert "/dev/shm/d/gone is open without a name" in line
    assert ask(source, "/held")["gone"]["ok"], "the source goes on"
    source.remove(grace_s=0)
    with mutant(swap_node, "shim/capture/sequence.py", line_taken_out("ghosts.check(")):
        source = source_with_deleted(swap_node, "ghost", path="/dev/shm/d/gone")
        taken = published(source)
        source.remove(grace_s=0)
        dropped = swap_node.path(DROPPED)
        dropped.mkdir(mode=0o700)
        before = dropped.stat().st_mtime_ns
        specs = with_neighbour(own_spec("ghost"), SWAPS_DIRECTORY, **POWERLESS)
        attacked(swap_node, specs, taken).remove(grace_s=0)
        assert dropped.stat().st_mtime_ns == before, "no file is made beside a neighbour"
        without = line_taken_out("_check_company(ticket, made")
        with mutant(swap_node, "shim/restore/opened.py", without, of_daemon=False):
            attacked(swap_node, specs, taken).remove(grace_s=0)
        assert dropped.stat().st_mtime_ns != before, "then root would have made a file there"
        swap_node.run(["sh", "-c", f"rm -f {RUN}/logs/*"])  # of a restore that may have failed


@pytest.mark.parametrize("mode", ["0o4600", "0o666"])
def test_deleted_file_whose_mode_criu_sets_by_name_is_not_captured(
    swap_node: Node, mode: str
) -> None:
    source = source_with_deleted(swap_node, f"ghost {mode}", path="/dev/shm/gone", mode=mode)
    line = said(swap_node, source.container().id[:12], "cannot capture a deleted file", within_s=30)
    assert f"its mode {int(mode, 8):04o} has bits of 7022" in line


def test_deleted_file_at_top_of_shm_is_captured_and_restored(swap_node: Node) -> None:
    source = source_with_deleted(swap_node, "ghost at the top", path="/dev/shm/gone")
    published(source)
    source.remove(grace_s=0)
    pod = restored(swap_node, own_spec("ghost at the top"), annotations=wishes())
    held = ask(pod, "/held")["gone"]
    assert (held["ok"], held["deleted"]) == (True, True)


@pytest.mark.attack(
    "a neighbour puts another file, and then a link, where CRIU makes a deleted file"
)
def test_no_deleted_file_is_made_beside_a_neighbour(swap_node: Node) -> None:
    source = source_with_deleted(swap_node, "ghost beside", path="/dev/shm/gone")
    taken = published(source)
    source.remove(grace_s=0)
    idle = "import time\nprint('armed', flush=True)\ntime.sleep(1000)"
    pod = attacked(swap_node, with_neighbour(own_spec("ghost beside"), idle), taken)
    told = said(swap_node, pod.container("main").id[:12], "a deleted file cannot be made again")
    assert "the 1 other containers of the pod" in told
