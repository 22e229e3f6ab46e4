"""Runs rounds of the storm on a node: captures once, and restores by the package again and again.

The storm begins by itself when it is restored, while the threads of the page server fill its memory
at full speed. So the storm meets little missing memory; but everything else is as it is shipped.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from tests.node.base import BUILD
from tests.node.kubelet import Pod
from tests.node.node import Node
from tests.node.podspec import ContainerSpec
from tests.node.swapping import captured, first_answer, nothing_left, restored, wishes
from tests.storm.direct import Round
from tests.workers import images
from tests.workers.storm import HANG_S

PACKAGES: Final = BUILD.parent / "packages"
SIZE_MIB: Final = 256
STORM_S: Final = 1.0
_SLACK_S: Final = 3 * HANG_S


def worker(size_mib: int = SIZE_MIB) -> ContainerSpec:
    """Returns the storm as a container."""
    environment = {
        "SIZE_MIB": str(size_mib), "SECONDS": str(STORM_S), "PROCESSES": "2", "THREADS": "4"
    }  # fmt: skip
    command = ["python3", "-m", "workers.storm"]
    return ContainerSpec(images.reference("probe"), command=command, env=environment)


def rounds(node: Node, spec: ContainerSpec) -> Iterator[Round]:
    """Yields rounds without end. The image must be there. Raises AssertionError."""
    source = captured(node, spec, name="storm", annotations=wishes())
    source.source.remove(grace_s=0)
    number = 0
    while True:
        number += 1
        began = time.monotonic()
        with restored(node, spec, name=f"storm-{number}") as pod:
            found = result(pod)
        found.seconds = round(time.monotonic() - began, 3)
        yield found


def result(pod: Pod) -> Round:
    """Wait for the end of the storm in a pod. Returns its round."""
    until = time.monotonic() + STORM_S + _SLACK_S
    while True:
        told = first_answer(pod, "/result")
        found = Round(
            told["seed"], wrong=told["wrong"], hangs=told["hangs"], operations=told["operations"]
        )
        if told["done"] or found.hangs:
            return found
        if time.monotonic() > until:
            found.hangs.append({"what": "the storm did not end"})
            return found
        time.sleep(0.1)


@contextmanager
def prepared(suite: str) -> Iterator[Node]:
    """Yields a node with the package and the image."""
    (deb,) = PACKAGES.glob("*.deb")
    archive = images.build("probe")
    with Node(suite) as node:
        node.start_product(deb)
        node.import_image(archive)
        with nothing_left(node):
            yield node
