"""The lean door to other programs: what is started there does not outlive us."""

import os
import select
import subprocess
import sys
import time

import pytest

from shim.kernel import process


def test_a_program_dies_with_who_started_it() -> None:
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


def test_a_program_that_is_not_there_is_an_error() -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        process.run(["no-such-program"], until=time.monotonic() + 10)
