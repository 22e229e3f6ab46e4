"""A pod tries to harm the daemon of its node, and so everybody: with files, names, arguments."""

import contextlib
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.node.attacking import HELPER, restart_daemon, run_helper
from tests.node.daemonfigures import SLOW_S, Figures, peak_bytes
from tests.node.kubelet import Pod
from tests.node.node import Node
from tests.node.podspec import ContainerSpec
from tests.node.swapping import (
    QUICKTHAW,
    RESTORE,
    RUN,
    STORE,
    VERIFIED,
    ask,
    assert_cold,
    assert_restored,
    captured,
    first_answer,
    lines_about,
    probe,
    published,
    said,
    wait_until,
    wipe_snapshots,
    wishes,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

MIB: Final = 1 << 20
GROWS_AT_MOST: Final = 100 * MIB
"""Of the daemon, whatever files a pod has. 100,000 entries take half of it."""
BY_SIGNAL: Final = wishes(capture_when="signal")
ENDS_WITHIN_S: Final = 90


@pytest.fixture
def figures(swap_node: Node) -> Iterator[Figures]:
    """Yields figures of a fresh daemon; at the end no step of its loop was slow."""
    restart_daemon(swap_node)
    pid, before = swap_node.daemon_pid, peak_bytes(swap_node.daemon_pid)
    found = Figures()
    yield found
    found.take(swap_node)
    print(found)
    assert swap_node.daemon_pid == pid, "the daemon was ended"
    assert found.peak_bytes - before < GROWS_AT_MOST, str(found)
    # By processor time: the machine of the tests has other work, which the clock includes.
    assert found.step_cpu_s < SLOW_S, str(found)
    wipe_snapshots(swap_node)


def attacker(node: Node, case: str, code: str, **fields: Any) -> Pod:
    """Starts a pod that opted in, runs `code`, and is then ready for its capture."""
    spec = probe(env={"CASE": case}, **fields)
    pod = node.kubelet.run_pod("attacker", [spec], annotations=BY_SIGNAL)
    first_answer(pod)
    pod.container().output(["python3", "-c", code], timeout_s=300)
    return pod


def not_captured(pod: Pod, *why: str) -> None:
    node, short = pod.node, pod.container().id[:12]
    ask(pod, "/ready")
    wait_until(
        lambda: any("no snapshot was made" in line for line in lines_about(node, pod.container())),
        "nothing was said", node, within_s=ENDS_WITHIN_S,
    )  # fmt: skip
    said(node, f"({short})", "no snapshot was made", *why)
    assert_cold(pod.container())
    assert first_answer(pod)["nonce"]
    left = list(node.path(f"{STORE}/staging").iterdir())
    assert left == [], "nothing of it stays"


DEEP: Final = """
import os
at = os.open("/srv", os.O_RDONLY)
for _ in range({depth}):
    os.mkdir("d" * 250, dir_fd=at)
    at, above = os.open("d" * 250, os.O_RDONLY, dir_fd=at), at
    os.close(above)
for number in range({files}):
    os.close(os.open(str(number), os.O_CREAT, dir_fd=at))
"""


@pytest.mark.attack("files in very long paths fill the node's memory through the daemon")
def test_listing_has_names_without_the_paths_above_them(swap_node: Node, figures: Figures) -> None:
    with attacker(swap_node, "deep", DEEP.format(depth=190, files=1500)) as pod:
        not_captured(pod, "bytes of path: a snapshot holds 3800 at most")
    figures.take(swap_node)

    def fill(pod: Pod) -> None:
        pod.container().output(["python3", "-c", DEEP.format(depth=14, files=5000)])
        ask(pod, "/ready")

    taken = captured(swap_node, probe(env={"CASE": "long"}), annotations=BY_SIGNAL, before=fill)
    taken.source.remove(grace_s=0)
    paths = 5000 * 14 * 251
    listing = (taken.directory / "rootfs.tree").stat().st_size
    assert listing < paths / 10, "the paths of all files together are not in it"
    sizes = taken.manifest()["sizes"]
    assert sizes["entries"] > 5000
    assert sizes["rootfs"] > listing + 5000 * 512, "and what they take is counted"
    marks = sum(path.stat().st_size for path in swap_node.path(VERIFIED).rglob("*/*"))
    assert marks < 64 << 10
    spec = probe(env={"CASE": "long"})
    with swap_node.kubelet.run_pod("replica", [spec], annotations=RESTORE) as pod:
        assert_restored(pod.container())


MANY: Final = """
import os
for number in range({files}):
    if number % 1000 == 0:
        os.mkdir(f"/srv/{{number}}")
        at = f"/srv/{{number}}"
    os.close(os.open(f"{{at}}/{{number}}", os.O_CREAT))
"""


@pytest.mark.attack("hundreds of thousands of empty files use up the node's inodes and its time")
def test_more_files_than_a_snapshot_holds_are_refused_at_once(
    swap_node: Node, figures: Figures
) -> None:
    with attacker(swap_node, "many", MANY.format(files=120_000)) as pod:
        began = time.monotonic()
        not_captured(pod, "100000 at most")
        assert time.monotonic() - began < 20
        # Not what the file system has left: other nodes of the tests take inodes of it, too.
        assert sum(1 for _ in swap_node.path(STORE).rglob("*")) < 1000
        assert frozen_of(pod) is None, "it was never frozen"


LOST: Final = (
    HELPER
    + """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
held = []
for number in range({lost}):
    fd = os.open(f"/srv/lost-{{number}}", os.O_CREAT | os.O_RDWR)
    os.link(f"/srv/lost-{{number}}", f"/srv/kept-{{number}}")
    os.unlink(f"/srv/lost-{{number}}")
    held.append(fd)
open("/srv/done", "w").close()
time.sleep(100000)
"""
)
FROZEN_AT_MOST_S: Final = 5.0


@pytest.mark.attack(
    "open files without a name among many files keep everything frozen for a minute"
)
def test_single_walk_finds_all_files_that_lost_a_name(swap_node: Node, figures: Figures) -> None:
    def fill(pod: Pod) -> None:
        container = pod.container()
        container.output(["python3", "-c", MANY.format(files=30_000)], timeout_s=300)
        container.output(["python3", "-c", LOST.format(lost=1800)])
        done = Path(f"/proc/{container.host_pid}/root/srv/done")
        wait_until(done.exists, "the helper has not begun", swap_node, within_s=30)
        time.sleep(3)
        ask(pod, "/ready")

    spec = probe(env={"CASE": "lost"})
    taken = captured(swap_node, spec, annotations=BY_SIGNAL, before=fill)
    frozen_s = taken.manifest()["timings"]["frozen"]
    print(f"frozen for {frozen_s} s", taken.manifest()["timings"])
    assert frozen_s < FROZEN_AT_MOST_S
    taken.source.remove(grace_s=0)
    with swap_node.kubelet.run_pod("replica", [spec], annotations=RESTORE) as pod:
        assert_restored(pod.container())


def frozen_of(pod: Pod) -> float | None:
    found = [line for line in lines_about(pod.node, pod.container()) if ": frozen " in line]
    return float(found[-1].partition(": frozen ")[2].split()[0]) if found else None


@pytest.mark.attack("a pod that goes in the midst of its long capture ends the daemon")
def test_capture_ends_soon_after_its_pod(swap_node: Node, figures: Figures) -> None:
    with attacker(swap_node, "gone", MANY.format(files=90_000)) as pod:
        ask(pod, "/ready")
        staging = swap_node.path(f"{STORE}/staging")
        wait_until(lambda: any(staging.glob("*/rootfs/srv/*")), "no copy", swap_node, within_s=30)
    began = time.monotonic()
    wait_until(lambda: not any(staging.iterdir()), "it is still there", swap_node, within_s=30)
    print(f"staging is empty {time.monotonic() - began:.2f} s after the pod went")


@pytest.mark.attack("what a capture left makes the next start of the daemon slow")
def test_daemon_start_does_not_wait_for_the_removal_of_left_overs(swap_node: Node) -> None:
    left = swap_node.path(f"{STORE}/staging/left")
    swap_node.stop_daemon()
    for directory in range(30):
        (left / f"{directory}").mkdir(parents=True)
        for number in range(1000):
            (left / f"{directory}" / f"{number}").touch()
    began = time.monotonic()
    swap_node.start_daemon()
    started_s = time.monotonic() - began
    leaving = swap_node.path(f"{STORE}/leaving")
    there = list(leaving.iterdir())
    print(f"READY after {started_s:.2f} s")
    assert there, "they were there when it was ready"
    wait_until(lambda: not list(leaving.iterdir()), "they stay", swap_node, within_s=60)


COUNT: Final = 60_000


def long_spec(letter: str) -> ContainerSpec:
    """Returns the probe with many arguments that it does not read."""
    command = ["python3", "-m", "workers.probe"]
    arguments = [f"{letter}{number}" for number in range(COUNT)]
    return probe(env={"CASE": "arguments"}, command=command, args=arguments)


@pytest.mark.attack("arguments without number keep the daemon from all other pods")
def test_long_spec_costs_the_daemon_little(swap_node: Node, figures: Figures) -> None:
    taken = captured(swap_node, long_spec("a"))
    taken.source.remove(grace_s=0)
    node = swap_node
    annotations = {"quickthaw.io/restore": f"sha256:{taken.id}"}
    began = time.monotonic()
    with node.kubelet.run_pod("other", [long_spec("b")], annotations=annotations) as pod:
        line = said(node, pod.container().id[:12], "args: the snapshot has")
        print(f"{time.monotonic() - began:.2f} s, a line of {len(line)} characters")
        assert len(line) < 10_000
        assert_cold(pod.container())
        told = json.loads(node.call([QUICKTHAW, "explain", "other", "--json"]).stdout)
        assert len(json.dumps(told)) < 200_000
    with node.kubelet.run_pod("same", [long_spec("a")], annotations=RESTORE) as pod:
        assert_restored(pod.container())


@pytest.mark.attack("a command that prints for ever fills the daemon's memory")
def test_daemon_does_not_keep_the_output_of_a_command(swap_node: Node, figures: Figures) -> None:
    code = "[print('x' * 65536) for _ in range(8000)]"
    wish = wishes(capture_when=f'exec:python3 -c "{code}; exit(1)"')
    with swap_node.kubelet.run_pod("yes", [probe(env={"CASE": "yes"})], annotations=wish):
        until = time.monotonic() + 8
        while time.monotonic() < until:
            figures.take(swap_node)
            time.sleep(0.5)


@pytest.mark.attack("variables that look like Services are compared with each other")
def test_many_variables_cost_the_daemon_little(swap_node: Node, figures: Figures) -> None:
    env = {
        f"S{number}_SERVICE_{what}": "1" for number in range(20_000) for what in ("HOST", "PORT")
    }
    with swap_node.kubelet.run_pod("env", [probe(env=env)], annotations=RESTORE) as pod:
        assert_cold(pod.container())


# Logs


def test_log_of_a_failed_restore_is_removed_with_its_snapshot(swap_node: Node) -> None:
    taken = captured(swap_node, probe(env={"CASE": "log"}))
    taken.source.remove(grace_s=0)
    log = swap_node.path(f"{RUN}/logs/{taken.id}.log")
    log.write_bytes(b"x")
    stranger = swap_node.path(f"{RUN}/logs/{'0' * 64}.log")
    stranger.write_bytes(b"x")
    restart_daemon(swap_node)
    assert log.exists()
    assert not stranger.exists(), "of a snapshot that is no more"
    swap_node.run([QUICKTHAW, "rm", taken.id])
    assert not log.exists()


ZERO: Final = """
import mmap
with open("/dev/zero", "rb+") as file:
    kept = mmap.mmap(file.fileno(), 4096, mmap.MAP_PRIVATE)
kept[:4] = b"kept"
open("/srv/mapped", "w").close()
time.sleep(3600)
"""


@contextlib.contextmanager
def bounded(pid: int) -> Iterator[None]:
    """Limits the address space of a process: the machine of the tests has other work."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (4 << 30, hard))
    yield
    resource.prlimit(pid, resource.RLIMIT_AS, (soft, hard))


@pytest.mark.attack("a process maps /dev/zero, and the daemon reads it without end")
def test_device_that_a_process_has_mapped_is_not_read(swap_node: Node, figures: Figures) -> None:
    with bounded(swap_node.daemon_pid), attacker(swap_node, "zero", "") as pod:
        run_helper(pod.container(), ZERO)

        def is_mapped() -> bool:
            return pod.container().exec(["test", "-e", "/srv/mapped"]).exit_code == 0

        wait_until(is_mapped, "the helper does not run", swap_node, within_s=20)
        ask(pod, "/ready")
        assert published(pod)
        assert first_answer(pod)["nonce"]
