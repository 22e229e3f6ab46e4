"""A step that fails while the daemon goes on leaves the same as a crash and a start."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shim.contract import faults
from shim.contract.errors import NotPublished
from tests.crash.operations import OPERATIONS, opened, prepared, violations

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    faults.disarm()


@pytest.fixture
def memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        yield Path(place)


POINTS = sorted(name for name in faults.POINTS if name.startswith("store."))


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "open"])
def test_a_failed_step_leaves_the_index_equal_to_the_disk(
    memory: Path, name: str, point: str
) -> None:
    root, operation = memory / "store", OPERATIONS[name]
    prepared(root)
    store = opened(root)
    assert faults.arm(json.dumps({"faults": [{"point": point, "action": "error"}]})) == []
    failed = False
    try:
        operation.change(store)
    except (OSError, NotPublished):
        failed = True
    faults.disarm()
    assert {each.id for each in store.all()} == set(os.listdir(store.snapshots))
    held = {each for each in os.listdir(root / "quarantine") if each.endswith(".json")}
    assert held <= {f"{each}.json" for each in store.quarantine.all()}, "in use, and yet held"
    if failed and name == "publish":
        assert os.listdir(store.staging) == [], "an unpublished snapshot does not exist"
        assert violations(root, frozenset({operation.before})) == []
    elif not failed:
        assert violations(root, frozenset({operation.after})) == []
    else:
        assert violations(root, frozenset({operation.before, operation.after})) == []
