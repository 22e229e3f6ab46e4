"""Program: run a command inside a test node, as if the node had started it.

`node` calls this program with a JSON argument (see `Entry`) and the command. Standard streams are
the caller's, the program passes signals on, the exit status is the command's. The command dies with
this program, and this program with its caller. `report_fd` gets the command's pid, as the host sees
it.
"""

import json
import os
import signal
import sys
from types import FrameType
from typing import TypedDict

# Runs by its path and isolated: nothing else names the directory of its neighbours.
sys.path.insert(0, os.path.abspath(f"{__file__}/../../.."))
from tests.node import kernel


class Entry(TypedDict):
    """The namespaces to enter, and the settings of the command."""

    parent_pid: int
    init_pid: int
    homes: list[str]
    environment: dict[str, str]
    report_fd: int | None


def main() -> int:
    """Returns the command's exit status, 128 and more for a signal."""
    entry: Entry = json.loads(sys.argv[1])
    kernel.die_with_parent(entry["parent_pid"])
    kernel.join_cgroups(entry["homes"])
    kernel.setns(os.pidfd_open(entry["init_pid"]), kernel.ALL_NAMESPACES)
    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    pid = os.fork()
    if pid == 0:
        kernel.die_with_parent(0)  # outside of this pid namespace: pid 0
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        run(sys.argv[2:], entry["environment"])

    def pass_on(number: int, _: FrameType | None) -> None:
        os.kill(pid, number)

    for each in signals:
        signal.signal(each, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    if entry["report_fd"] is not None:
        os.write(entry["report_fd"], f"{pid}\n".encode())
        os.close(entry["report_fd"])
    return status(pid)


def run(argv: list[str], environment: dict[str, str]) -> None:
    """Become the command; returns 127 when there is none."""
    os.chdir("/")
    try:
        os.execvpe(argv[0], argv, environment)
    except OSError as error:
        os.write(2, f"{argv[0]}: {error.strerror}\n".encode())
        os._exit(127)


def status(pid: int) -> int:
    """Wait for `pid`, and return its exit status."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
