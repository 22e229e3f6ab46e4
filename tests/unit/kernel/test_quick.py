"""Preparations so that others do not wait for the kernel: they change nothing else."""

import os
import subprocess
import sys
import time
from pathlib import Path

from shim.kernel import perfevent
from shim.kernel.cgroup import QuickMoves, _where_we_are


def cgroups() -> str:
    return Path("/proc/self/cgroup").read_text()


def test_process_stays_in_its_cgroup_and_the_next_move_is_quick() -> None:
    before, open_before = cgroups(), len(os.listdir("/proc/self/fd"))
    moves = QuickMoves()
    moves.again()
    with subprocess.Popen([sys.executable, "-ISc", "input()"], stdin=subprocess.PIPE) as other:
        took_s = []
        for _ in range(20):
            moves.again()
            began = time.perf_counter()
            Path(_where_we_are()).write_text(str(other.pid))
            took_s.append(time.perf_counter() - began)
        other.communicate(b"\n")
    moves.close()
    assert cgroups() == before
    assert len(os.listdir("/proc/self/fd")) == open_before
    # A waiting event takes 5 ms at least, if the kernel has anything to wait for.
    assert sorted(took_s)[10] < 0.003, "moves wait although there was one just before"


def test_a_second_perf_event_does_not_wait() -> None:
    held = perfevent.hold()
    took_s = []
    for _ in range(20):
        began = time.perf_counter()
        os.close(perfevent.hold())
        took_s.append(time.perf_counter() - began)
    os.close(held)
    assert sorted(took_s)[10] < 0.003
