"""Tests power loss with `tests.crash.power`.

QUICKTHAW_CRASH=all (`make crash`) takes half an hour and looks further.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.crash.operations import OPERATIONS

ALL = os.environ.get("QUICKTHAW_CRASH") == "all"
SUBSETS, SEEDS = ("16", range(1, 4)) if ALL else ("2", range(1, 2))
OPTIONS = ("data=ordered", "data=writeback") if ALL else ("data=ordered",)

CASES = [(operation, "0") for operation in OPERATIONS]
CASES += [
    (operation, "0.3" if ALL else "0.05") for operation in (OPERATIONS if ALL else ["publish"])
]
"""The operation, and the probability of a sync by another process before each of its changes."""


def power_lost(operation: str, *arguments: str) -> dict[str, Any]:
    """Returns the findings of the bench."""
    argv = [sys.executable, "-m", "tests.crash.power", operation, *arguments]
    ended = subprocess.run(argv, stdout=subprocess.PIPE, check=True, timeout=280)
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("operation", "others"), CASES)
def test_whenever_the_power_goes_every_snapshot_is_whole_or_absent(
    operation: str, options: str, others: str, seed: int
) -> None:
    found = power_lost(
        operation, "--options", options, "--others", others, "--seed", str(seed),
        "--subsets", SUBSETS,
    )  # fmt: skip
    assert found["violations"] == []
    assert found["flushes"] >= 2, "nothing was made durable: this test proves nothing"
    assert found["disks"] > found["flushes"], "no crash between two flushes was looked at"


@pytest.mark.parametrize(
    ("operation", "without", "symptom"),
    [
        ("publish", "syncfs", "damaged"),
        ("publish", "fsync", "there are ['held', "),
        ("remove", "fsync", "there are ['held', "),
        ("quarantine", "fsync", "there are ['held', "),
        ("release", "fsync", "there are ['held', "),
    ],
)
def test_a_store_that_forgets_to_sync_is_caught(operation: str, without: str, symptom: str) -> None:
    """Check by mutations that the test above can fail."""
    found = power_lost(operation, "--without", without)
    assert any(symptom in violation for violation in found["violations"]), found
