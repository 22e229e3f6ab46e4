"""The guard of a swap cleans up after a killed or stopped swap, and after no other."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from shim.contract import outcome
from tests.unit.tickets import a_ticket

ROOT = Path(__file__).parents[3]


def guarded(tmp_path: Path, ends: str) -> outcome.Outcome | None:
    """Runs a guarded process that `ends`; returns the outcome that the guard wrote, if it did."""
    code = (
        "import sys, time, os\n"
        "from shim.contract import ticket, outcome\n"
        "from shim.restore import guard\n"
        f"guard.outcome.write.__defaults__ = ({str(tmp_path)!r},)\n"
        "from shim.restore import forget\n"
        "forget.forget = lambda container: None\n"
        "t = ticket.decode(sys.argv[1])\n"
        f"with guard.watching(t, ['true'], time.monotonic() + 0.5): {ends}\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, a_ticket().encode().decode()], cwd=ROOT, check=False
    )
    deadline = time.monotonic() + (5 if ended.returncode else 0.2)
    while time.monotonic() < deadline and not (tmp_path / "abc.json").exists():
        time.sleep(0.01)
    return outcome.take("abc", str(tmp_path))


@pytest.mark.parametrize(
    ("ends", "why"),
    [("os.kill(os.getpid(), 9)", "was killed"), ("time.sleep(60)", "hung, and was killed")],
)
def test_guard_ends_a_killed_or_stopped_swap(tmp_path: Path, ends: str, why: str) -> None:
    found = guarded(tmp_path, ends)
    assert found
    assert (found.result, found.error_class) == (outcome.KILLED, "SwapKilled")
    assert why in found.error


@pytest.mark.parametrize("ends", ["pass", "raise SystemExit(0)"])
def test_guard_leaves_a_finished_swap_alone(tmp_path: Path, ends: str) -> None:
    assert guarded(tmp_path, ends) is None
