"""The lean way to start other programs: a started program does not outlive the process."""

import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shim.kernel import process


def test_program_dies_with_its_starter() -> None:
    start = (
        "import time; from shim.kernel import process; process.run(%r, until=time.monotonic() + 60)"
    )
    command = ["sh", "-c", "echo $$; exec sleep 1000"]
    with subprocess.Popen(
        [sys.executable, "-c", start % command], stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        fd = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    ended, _, _ = select.select([fd], [], [], 10)
    os.close(fd)
    assert ended


def test_missing_program_is_an_error() -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        process.run(["no-such-program"], until=time.monotonic() + 10)


def test_late_program_is_killed_with_its_children() -> None:
    began = time.monotonic()
    with pytest.raises(process.TooLate):
        process.run(["sh", "-c", "sleep 1000 & sleep 1000"], until=began + 0.2, quiet=True)
    assert time.monotonic() - began < 5
    assert process.run(["sh", "-c", "exit 7"], until=time.monotonic() + 10) == 7
    assert process.run(["sh", "-c", "kill -9 $$"], until=time.monotonic() + 10) == 128 + 9


def test_preparation_runs_in_the_child(tmp_path: Path) -> None:
    here, there = os.getcwd(), str(tmp_path)
    argv = ["sh", "-c", f"test $(pwd -P) = {tmp_path.resolve()}"]
    first = lambda: os.chdir(there)  # noqa: E731
    assert process.run(argv, until=time.monotonic() + 10, first=first) == 0
    assert os.getcwd() == here
    with pytest.raises(NotADirectoryError):
        process.run(argv, until=time.monotonic() + 10, first=lambda: os.chdir("/dev/null"))
