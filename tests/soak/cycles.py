"""Runs the cycles of the soak: a pod is restored and removed; a running pod is captured."""

import json
import time
from collections.abc import Callable
from typing import Final

from tests.node.kubelet import Pod
from tests.node.node import Node
from tests.node.swapping import (
    PER_CONTAINER,
    QUICKTHAW,
    RUN,
    SnapshotRef,
    ask,
    captured,
    first_answer,
    is_restored,
    probe,
    wait_until,
    wishes,
)
from tests.soak import levels
from tests.soak.levels import Levels

WRITTEN_BYTES: Final = 4096
"""The captured pod writes this much between two captures."""
Tell = Callable[[int, float], None]
"""Called after each cycle with its number and its seconds."""


class WentWrong(Exception):
    """A cycle failed. The message says which, and how."""


def restores(node: Node, count: int, tell: Tell) -> list[Levels]:
    """Restore and remove a pod `count` times. Raises WentWrong."""
    snapshot = captured(node, probe())
    snapshot.source.remove(grace_s=0)
    taken = []
    for number in range(count):
        began = time.perf_counter()
        with node.kubelet.run_pod(f"replica-{number}", [probe()], annotations=wishes()) as pod:
            _check_restored(pod, snapshot.nonce)
        tell(number, time.perf_counter() - began)
        taken.append(_levels(node))
    _remove(node, snapshot.id)
    return taken


def captures(node: Node, count: int, tell: Tell) -> list[Levels]:
    """Capture the same running pod `count` times, and start a pod from every tenth.

    Raises WentWrong.
    """
    first = captured(node, probe(), name="captured")
    _remove(node, first.id)
    taken = []
    for number in range(count):
        began = time.perf_counter()
        _check_serving(first, number)
        snapshot = _capture(node, first.source)
        if number % 10 == 0:
            with node.kubelet.run_pod("replica", [probe()], annotations=wishes()) as pod:
                _check_restored(pod, first.nonce)
        _remove(node, snapshot)
        tell(number, time.perf_counter() - began)
        taken.append(_levels(node, pods=1))
    first.source.remove(grace_s=0)
    return taken


def _check_restored(pod: Pod, nonce: str) -> None:
    if not is_restored(pod.container()):
        raise WentWrong(f"{pod.spec.name} started cold:\n{pod.node.journal()[-2000:]}")
    if (found := first_answer(pod)["nonce"]) != nonce:
        raise WentWrong(f"{pod.spec.name} answers as {found}, the captured process is {nonce}")


def _check_serving(snapshot: SnapshotRef, number: int) -> None:
    """Check that the source is still the same process, and can write to its root file system."""
    ask(snapshot.source, f"/write?path=/tmp/soak&size={WRITTEN_BYTES}&seed={number + 1}")
    if first_answer(snapshot.source)["nonce"] != snapshot.nonce:
        raise WentWrong("the captured pod is another process than before")


def _capture(node: Node, pod: Pod) -> str:
    told = json.loads(node.run([QUICKTHAW, "capture", "--json", pod.spec.name]))
    return str(told["id"])


def _remove(node: Node, snapshot: str) -> None:
    node.run([QUICKTHAW, "rm", snapshot])


def _levels(node: Node, pods: int = 0) -> Levels:
    """Returns the levels once the daemon has seen the last pod go. pods: the number that stay."""

    def settled() -> bool:
        left = [
            len(list(node.path(f"{RUN}/{each}").glob("*")))
            for each in PER_CONTAINER
            if each in ("tickets", "swapped", "outcomes")
        ]
        kept = len(list(node.path(f"{RUN}/containers").glob("*")))
        return not any(left) and kept == pods

    wait_until(settled, "something is left of a pod that was removed", node)
    return levels.take(node)
