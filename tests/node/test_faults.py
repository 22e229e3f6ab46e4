"""Some cases of `make faults`, a case of each kind: see tests/faults."""

from collections.abc import Iterator

import pytest

from tests.faults.__main__ import one
from tests.faults.cases import Case, matrix
from tests.faults.ground import Ground
from tests.node.node import Node

CASES = (
    "restore.check/hang",
    "restore.shm.noted/enospc",
    "restore.criu.ended/kill",
    "restore.undo/error",
    "restore.outcome/enospc",
    "hook.prestart.done/error",
    "daemon.decide/kill",
    "capture.frozen/kill",
    "capture.frozen/hang",
    "capture.quiesced/kill",
    "restore: daemon/killed during the swap",
    "restore: containerd/restarted during the swap",
)


@pytest.fixture(scope="module")
def ground(swap_node: Node) -> Iterator[Ground]:
    """Yields the node with a snapshot whose source runs, which no case may disturb."""
    made = Ground(swap_node)
    yield made
    assert made.close() == []


@pytest.mark.parametrize(
    "case", [each for each in matrix() if each.name in CASES], ids=lambda case: case.name
)
def test_pod_runs_after_a_fault_and_nothing_is_left(ground: Ground, case: Case) -> None:
    result = one(ground, case)
    assert result["wrong"] == []
    assert result["left_overs"] == []
    assert result["source_state"] == "serves"


def test_every_named_case_exists() -> None:
    assert set(CASES) <= {each.name for each in matrix()}
