"""The real runtime of the node's configuration, and commands that run in the container."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.node.kubelet import Pod
from tests.node.node import Node
from tests.node.swapping import captured, first_answer, probe, restored, said, wipe_snapshots

pytestmark = pytest.mark.usefixtures("nothing_left")

RUNTIME = "/etc/quickthaw/runtime"
OWN = "/usr/local/bin/own-runtime"
CALLS = "/run/own-runtime.calls"
SCRIPT = f"""#!/bin/sh
echo "$*" >>{CALLS}
exec runc "$@"
"""


@pytest.fixture(autouse=True)
def no_snapshots_after_it(swap_node: Node) -> Iterator[None]:
    yield
    wipe_snapshots(swap_node)


@contextmanager
def own_runtime(node: Node) -> Iterator[None]:
    """Configures another runtime than runc, as the node's operator would."""
    before = node.path(RUNTIME).read_text()
    node.write(OWN, SCRIPT)
    node.path(OWN).chmod(0o755)
    node.write(RUNTIME, f"{OWN}\n")
    try:
        yield
    finally:
        node.kubelet.remove_pods()  # also their deletion is the configured runtime's
        node.write(RUNTIME, before)
        node.run(["rm", "-f", OWN, CALLS])


def test_configured_runtime_creates_captures_and_restores(swap_node: Node) -> None:
    with own_runtime(swap_node):
        taken = captured(swap_node, probe())
        pod = restored(swap_node, probe())
        assert first_answer(pod)["nonce"] == taken.nonce
        calls = [line.split() for line in swap_node.path(CALLS).read_text().splitlines()]
        for container, verbs in (
            (taken.source.container(), {"create", "start", "checkpoint"}),
            (pod.container(), {"restore"}),
        ):
            own = {word for call in calls if container.id in call for word in call}
            assert verbs <= own, f"{sorted(verbs)} are calls of the configured runtime"


def test_capture_waits_for_a_command_that_runs_in_the_container(swap_node: Node) -> None:
    busy = threading.Event()

    def begin(pod: Pod) -> None:
        def command() -> None:
            busy.set()
            container.exec(["/bin/sleep", "3"])

        container = pod.container()
        threading.Thread(target=command).start()
        busy.wait()
        time.sleep(0.5)  # until the command runs: exec answers only at its end
        container.exec(["/bin/sh", "-c", "touch /run/quickthaw/ready"])

    annotations = {"quickthaw.io/snapshot": "auto"}
    taken = captured(swap_node, probe(), annotations=annotations, before=begin)
    assert first_answer(restored(swap_node, probe()))["nonce"] == taken.nonce
    said(swap_node, f"({taken.source.container().id[:12]}) captured as ")
