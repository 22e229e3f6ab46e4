"""The lean way to start other programs: a started program does not outlive the process."""

import os
import select
import subprocess
import sys
import time

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
