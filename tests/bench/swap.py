"""Times a swap, whatever the size of memory: `python -m tests.bench.swap [PAIRS] [OTHER.deb]`.

Restores a small worker again and again on a single node and prints the median milliseconds from
StartContainer to the first answer, of StartContainer itself and of every step of the outcome. With
another package, both are measured by turns: two columns that were taken at different times, on a
shared machine, cannot be compared. docs/performance.md has the figures.
"""

import ast
import socket
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from tests.node import kernel
from tests.node.kubelet import Pod
from tests.node.node import Node
from tests.node.podspec import ContainerSpec
from tests.node.swapping import (
    PORT,
    PROBE,
    RESTORE,
    SNAPSHOTS,
    VERIFIED,
    assert_restored,
    nothing_left,
    published,
    said,
    wait_until,
    wishes,
)
from tests.workers import images

SUITE: Final = "forky"
PACKAGES: Final = Path(__file__).parents[2] / "build" / "packages"
PREFIX: Final = "/usr/lib/quickthaw"
REQUEST: Final = b"GET /first HTTP/1.0\r\n\r\n"
ASK_EVERY_S: Final = 0.002
ANSWER_WITHIN_S: Final = 30.0
WARM_UP: Final = 2
WORKER: Final = ContainerSpec(
    PROBE, command=["python3", "-m", "workers.memory"], env={"SIZE_MIB": "16"}
)

Run = dict[str, float]
"""Milliseconds by step."""


def main() -> int:
    """Measure, and print the table."""
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    (deb,) = PACKAGES.glob("*.deb")
    debs = [Path(other) for other in sys.argv[2:3]] + [deb]
    names = ["before", "now"][-len(debs) :]
    runs: dict[str, list[Run]] = {name: [] for name in names}
    with Node(SUITE) as node:
        _favour(node)
        for name, each in zip(names, debs, strict=True):
            node.install_deb(each)
            node.run(["cp", "-a", PREFIX, f"{PREFIX}.{name}"])
        node.run(["rm", "-r", PREFIX])
        node.run(["ln", "-s", f"{PREFIX}.{names[-1]}", PREFIX])
        node.start_containerd()
        node.start_daemon()
        node.import_image(images.build("probe"))
        with nothing_left(node):
            for name in names:  # the other's format may be another one
                _use(node, name)
                with node.kubelet.run_pod("source", [WORKER], annotations=wishes()) as source:
                    published(source)
                _put_aside(node, name)
            _use(node, names[-1])
            for number in range(-WARM_UP, pairs):
                for name in names if number % 2 else names[::-1]:
                    if len(names) > 1:
                        _put_aside(node, names[1 - names.index(name)])
                        _use(node, name)
                    run = _restore(node, f"{name}-{number + WARM_UP}")
                    if number >= 0:
                        runs[name].append(run)
            node.run(["rm", "-rf", *(f"{SNAPSHOTS}.{name}" for name in names)])
    _print(runs)
    return 0


def _favour(node: Node) -> None:
    """Give the node a larger share of the processors than all else on this machine."""
    for cgroup in node.cgroups:
        if (shares := cgroup / "cpu.shares").exists():
            shares.write_text("262144")
        elif (weight := cgroup / "cpu.weight").exists():
            weight.write_text("10000")


def _put_aside(node: Node, name: str) -> None:
    """Keep the snapshots of a package for its next turn; no error if its turn was not."""
    if node.path(SNAPSHOTS).is_dir() and not node.path(f"{SNAPSHOTS}.{name}").is_dir():
        with node.daemon_stopped():
            node.run(["mv", SNAPSHOTS, f"{SNAPSHOTS}.{name}"])


def _use(node: Node, name: str) -> None:
    """Make a package and its snapshots the installed ones, as far as a swap can tell.

    Waits until the daemon has verified the snapshots, as it does after a boot.
    """
    with node.daemon_stopped():
        node.run(["ln", "-sfn", f"{PREFIX}.{name}", PREFIX])
        if node.path(f"{SNAPSHOTS}.{name}").is_dir():
            node.run(["rm", "-rf", SNAPSHOTS])
            node.run(["mv", f"{SNAPSHOTS}.{name}", SNAPSHOTS])
    for snapshot in node.path(SNAPSHOTS).iterdir():
        marks = node.path(f"{VERIFIED}/{snapshot.name}")
        wait_until((marks / "memory").exists, "no marks are made", node, within_s=30)


def _restore(node: Node, name: str) -> Run:
    with node.kubelet.make_pod(name, [WORKER], annotations=RESTORE) as pod:
        pod.run_sandbox()
        container = pod.container()
        container.create()
        with ThreadPoolExecutor(1, "asking") as thread:
            answered = thread.submit(_ask_until_answered, pod)
            called_s = container.start()
            first_s = answered.result() - called_s
        assert_restored(container)
        line = said(node, f"({container.id[:12]}) restored from ")
        steps: Run = ast.literal_eval(line[line.index("{") :])
        whole = float(line.partition(" in ")[2].split()[0])
        return {
            name: seconds * 1000
            for name, seconds in {
                "first answer": first_s, "StartContainer": container.start_took_s,
                "swap": whole, **steps,
            }.items()
        }  # fmt: skip


def _ask_until_answered(pod: Pod) -> float:
    """Returns the answer's time, by time.perf_counter(). Its thread joins the node's network."""
    with open(f"/proc/{pod.node.pid}/ns/net") as namespace:
        kernel.setns(namespace.fileno(), kernel.CLONE_NEWNET)
    deadline = time.monotonic() + ANSWER_WITHIN_S
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((pod.ip, PORT), ANSWER_WITHIN_S) as client:
                client.sendall(REQUEST)
                if client.recv(1 << 16).split()[1:2] == [b"200"]:
                    return time.perf_counter()
        except ConnectionError:
            pass  # refused at once: nothing listens yet
        time.sleep(ASK_EVERY_S)
    raise TimeoutError(f"{pod.spec.name} has not answered: {pod.container().logs()[-2000:]}")


def _print(runs: dict[str, list[Run]]) -> None:
    count = min(map(len, runs.values()))
    print(f"milliseconds, medians of {count} (smallest in brackets)")
    print(f"{'':16}" + "".join(f"{name:>18}" for name in runs))
    for what in list(runs.values())[-1][0]:
        cells = []
        for each in runs.values():
            values = [run[what] for run in each if what in run]
            text = f"{statistics.median(values):.1f} ({min(values):.1f})" if values else "-"
            cells.append(f"{text:>18}")
        print(f"{what:16}" + "".join(cells))


if __name__ == "__main__":
    sys.exit(main())
