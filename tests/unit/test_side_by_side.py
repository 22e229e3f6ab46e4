"""The end of the output of `make test` has each failed test with its reason."""

import subprocess
import sys
from pathlib import Path
from typing import Final

from tests import side_by_side

ROOT: Final = Path(__file__).parents[2]
TESTS: Final = """
import pytest

@pytest.fixture
def broken():
    raise OSError("no fixture")

@pytest.mark.parametrize("case", ["Putting parasite blob"])
def test_fails(case):
    assert case == "another", "a reason\\nand more of it"

def test_fixture(broken):
    pass

def test_passes():
    pass
"""


def test_failed_tests_come_last_each_with_its_reason(tmp_path: Path) -> None:
    wrong, right = tmp_path / "test_wrong.py", tmp_path / "test_right.py"
    wrong.write_text(TESTS)
    right.write_text("def test_all_is_well():\n    pass\n")
    plain = "-p no:cacheprovider --rootdir"
    runs = [f"{plain} {tmp_path} {wrong}", f"nice {plain} {tmp_path} {right}"]
    argv = [sys.executable, "-m", "tests.side_by_side", *runs]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    *_, sums, took, first, second = done.stdout.splitlines()
    assert sums == "2 passed, 2 failed, 0 skipped"
    assert took.endswith(" s")
    assert first.startswith("FAILURE test_wrong.py::test_fails[Putting parasite blob]: ")
    assert first.endswith("AssertionError: a reason")
    assert second == "ERROR test_wrong.py::test_fixture: OSError: no fixture"


def test_run_that_leaves_no_report_is_told(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "tests.side_by_side", f"--rootdir {tmp_path} --no-such-option"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=False)
    last = done.stdout.splitlines()[-1]
    assert last.startswith("pytest --rootdir")
    assert "exit status 4" in last
    assert "no-such-option" in last


def test_many_failures_are_shortened() -> None:
    lines = [f"FAILURE {number} {'x' * 1000}" for number in range(50)]
    told = side_by_side.shortened(lines)
    assert told[-1] == "and 20 more"
    assert len(told) == 31
    assert all(len(line) <= side_by_side.MOST_CHARACTERS for line in told)
