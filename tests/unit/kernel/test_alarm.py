"""The alarm ends code that hangs, at its deadline, and nothing else."""

import os
import signal
import sys
import time

import pytest

from shim.kernel import alarm, process


def test_alarm_ends_only_code_that_hangs() -> None:
    began = time.monotonic()
    with pytest.raises(alarm.TooLate), alarm.raising(began + 0.1):
        time.sleep(60)
    with alarm.raising(time.monotonic() + 60):
        pass
    assert time.monotonic() - began < 5
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_alarm_during_a_program_kills_the_program() -> None:
    until = time.monotonic() + 30
    with pytest.raises(alarm.TooLate), alarm.raising(time.monotonic() + 0.2):
        process.run(["sh", "-c", "sleep 1000 & exec sleep 1000"], until=until, quiet=True)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    blocked = "import signal; exit(bool(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
    assert process.run([sys.executable, "-c", blocked], until=until) == 0


def test_alarm_that_is_held_rings_later() -> None:
    reached = []

    def hold() -> None:
        with alarm.held():
            time.sleep(0.2)
            reached.append("the end of the hold")
        reached.append("more")

    with pytest.raises(alarm.TooLate), alarm.raising(time.monotonic() + 0.05):
        hold()
    assert reached == ["the end of the hold"]
