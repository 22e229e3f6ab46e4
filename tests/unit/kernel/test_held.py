"""A pidfd or start time, and not the number alone, identifies a process."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shim.kernel import held, netns, survivors
from shim.kernel.held import Held

CONTAINER = "c" * 64
SLEEPS = [sys.executable, "-ISE", "-c", "import time; time.sleep(60)"]


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_process_of_another_cgroup_is_not_held() -> None:
    before = open_fds()
    with subprocess.Popen(SLEEPS) as stranger:
        with pytest.raises(ProcessLookupError, match="none of container"):
            Held(stranger.pid, CONTAINER)
        stranger.kill()
    with pytest.raises(OSError, match="No such process"):
        Held(stranger.pid, CONTAINER)
    assert open_fds() == before


def test_ended_process_is_not_read_and_its_network_descriptor_stays_valid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(survivors, "is_member", lambda pid, container: True)
    with subprocess.Popen(SLEEPS) as child, Held(child.pid, CONTAINER) as found:
        with found.open("root", os.O_PATH | os.O_DIRECTORY) as root:
            assert os.path.samestat(os.fstat(root.fileno()), os.stat("/"))
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(ProcessLookupError, match="has ended"):
            found.open("status")
        network = netns.identity(f"/proc/self/fd/{found.network_fd()}")
        assert network == netns.identity("/proc/self/ns/net")
    found.close()
    with pytest.raises(ValueError, match="closed"):
        found.network_fd()


def test_unexpected_network_namespace_is_not_entered() -> None:
    device, inode = netns.identity("/proc/self/ns/net")
    with pytest.raises(OSError, match="another network namespace") as raised:
        netns.enter("/proc/self/ns/net", [device, inode + 1])
    assert raised.value.errno == errno.ESTALE


def test_kill_reaches_only_the_parent() -> None:
    with subprocess.Popen(SLEEPS) as stranger:
        held.kill_parent(stranger.pid)  # not our parent, whatever its number was before
        assert stranger.poll() is None
        stranger.kill()
    code = (
        "import os, sys, time; sys.path.insert(0, sys.argv[1]); from shim.kernel import held\n"
        "parent = os.getpid()\n"
        "if not os.fork(): held.kill_parent(parent); os._exit(0)\n"
        "time.sleep(60)"
    )
    here = str(Path(__file__).parents[3])
    done = subprocess.run([sys.executable, "-ISE", "-c", code, here], check=False, timeout=30)
    assert done.returncode == -signal.SIGKILL
