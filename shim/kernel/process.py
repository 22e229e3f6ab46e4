"""Runs other programs: an argument list, a deadline, always reaped. Lean.

For the swap path, where importing `subprocess` costs 10 ms. The child stays in our process tree
and in our session (containerd's shim must inherit a restored init), but leads a process group of
its own, so that one signal kills every process in that group. The child dies with us: a `runc
restore` that outlived `quickthaw-runc` would restore a container that nobody owns.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time

from shim.kernel import alarm
from shim.kernel.alarm import TooLate as TooLate
from shim.kernel.libc import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import NoReturn

_RESET = (signal.SIGPIPE, signal.SIGXFSZ)  # the interpreter ignores these; programs expect not
_PR_SET_PDEATHSIG = 1
_ERRNO_BYTES = 16
_DIES_WITHIN_S = 5.0
"""Time for SIGKILL. Nobody waits any longer for a process in uninterruptible sleep."""


def run(
    argv: Sequence[str],
    *,
    until: float,
    env: Mapping[str, str] | None = None,
    quiet: bool = False,
    first: Callable[[], None] | None = None,
) -> int:
    """Run `argv` (argv[0] is searched in PATH) with our own stdin, stdout and stderr.

    quiet: with /dev/null instead, to keep output out of the pod's log. until: deadline on
    `time.monotonic`. first: called in the child before it becomes the program.
    Returns the exit status; 128 + signal after a signal.
    Raises TooLate after killing its process group, OSError when the program cannot be executed.
    """
    # A child that an alarm made us forget would never be killed.
    with alarm.held():
        child = Child(argv, os.environ if env is None else env, quiet=quiet, first=first)
        try:
            return child.wait(until)
        finally:
            child.end()


def let_go_of_streams() -> None:
    """Replace the standard streams with /dev/null: the pod's log is not ours."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)


class Child:
    """A running program: see `run`. `end` must follow; the caller must have this before an alarm.

    Raises OSError when the program cannot be executed.
    """

    __slots__ = ("_name", "_pid")

    def __init__(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        *,
        quiet: bool = False,
        first: Callable[[], None] | None = None,
    ) -> None:
        self._name, self._pid = argv[0], _spawn(argv, env, quiet, first)

    @property
    def pid(self) -> int:
        """Returns the pid, until `wait` or `end` has seen the program's end; then 0."""
        return self._pid

    def ends(self, until: float) -> bool:
        """Wait for the end, without reaping. False when that is too late."""
        return ends(self._pid, until)

    def wait(self, until: float) -> int:
        """Returns the exit status; 128 + signal after a signal. Raises TooLate. Call it once."""
        with alarm.held():
            with alarm.heard():
                ended = self.ends(until)
            if not ended:
                raise TooLate(f"{self._name} did not end in time")
            code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
            self._pid = 0
        return code if code >= 0 else 128 - code

    def end(self) -> None:
        """Kill the program and its process group, unless `wait` has seen its end."""
        with alarm.held():
            if not self._pid:
                return
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)  # not reaped yet, so the group is still ours
            if self.ends(time.monotonic() + _DIES_WITHIN_S):
                os.waitpid(self._pid, 0)
            self._pid = 0


def ends(pid: int, until: float) -> bool:
    """Wait for the end of our child, without reaping. False when that is too late."""
    wait_fd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(wait_fd, select.POLLIN)
        return bool(poll.poll(max(0, until - time.monotonic()) * 1000))
    finally:
        os.close(wait_fd)


def _spawn(
    argv: Sequence[str], env: Mapping[str, str], quiet: bool, first: Callable[[], None] | None
) -> int:
    """Start the program. Returns the pid after a successful exec. Raises OSError.

    Not posix_spawn, which has no parent-death signal. This process has a single thread, so fork is
    safe.
    """
    parent = os.getpid()
    read_fd, write_fd = os.pipe()  # closed by a successful exec
    pid = os.fork()
    if not pid:
        _become(argv, env, quiet, first, parent, write_fd)
    os.close(write_fd)
    with open(read_fd, "rb") as report:
        failed = report.read(_ERRNO_BYTES)
    if failed:
        os.waitpid(pid, 0)
        raise OSError(int(failed), os.strerror(int(failed)), argv[0])
    return pid


def _become(
    argv: Sequence[str],
    env: Mapping[str, str],
    quiet: bool,
    first: Callable[[], None] | None,
    parent: int,
    report_fd: int,
) -> NoReturn:
    """Run the child's side. Never returns: no code of ours may run on in the child."""
    try:
        call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == parent:
            os.setpgid(0, 0)
            for number in _RESET:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGALRM,))  # exec would pass it on
            if quiet:
                let_go_of_streams()
            if first:
                first()
            os.execvpe(argv[0], list(argv), env)
    except OSError as error:
        os.write(report_fd, str(error.errno).encode())
    finally:
        os._exit(127)
