"""The lean door to other programs: an argument list, a deadline, always reaped.

For the swap path, where importing `subprocess` costs 10 ms. The child stays in our process tree
and in our session (a restored init must be inherited by containerd's shim), but leads a process
group of its own, so that everything which has not left it can be killed at once. It dies with us:
a `runc restore` that outlived `quickthaw-runc` would restore a container that nobody owns.
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

_RESET = (signal.SIGPIPE, signal.SIGXFSZ)  # the interpreter ignores them, programs expect not
_PR_SET_PDEATHSIG = 1
_ERRNO_BYTES = 16
_DIES_WITHIN_S = 5.0
"""What SIGKILL needs. A process in uninterruptible sleep is not waited for any longer."""


def run(
    argv: Sequence[str],
    *,
    until: float,
    env: Mapping[str, str] | None = None,
    quiet: bool = False,
    first: Callable[[], None] | None = None,
) -> int:
    """Run `argv` (argv[0] is searched in PATH) with our own stdin, stdout and stderr.

    quiet: with /dev/null instead, for what must not reach the pod's log. until: deadline on
    `time.monotonic`. first: what the child does before it becomes the program.
    Returns the exit status; 128 + signal when it was killed.
    Raises TooLate after killing its process group, OSError when it cannot be executed.
    """
    # A child that an alarm made us forget would never be killed.
    with alarm.held():
        child = Child(argv, os.environ if env is None else env, quiet=quiet, first=first)
        try:
            return child.wait(until)
        finally:
            child.end()


def let_go_of_streams() -> None:
    """No standard stream of the caller's any more, but /dev/null: the pod's log is not ours."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)


class Child:
    """A program that was started: see `run`. `end` must follow, and know of it before an alarm.

    Raises OSError when it cannot be executed.
    """

    __slots__ = ("_name", "_pid")

    def __init__(
        self, argv: Sequence[str], env: Mapping[str, str], *, quiet: bool = False,
        first: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        self._name, self._pid = argv[0], _spawn(argv, env, quiet, first)

    @property
    def pid(self) -> int:
        """Its number, until `wait` or `end` has seen its end; then 0."""
        return self._pid

    def ends(self, until: float) -> bool:
        """Wait for its end, which is not reaped by this. False when that is too late."""
        return ends(self._pid, until)

    def wait(self, until: float) -> int:
        """Its exit status; 128 + signal when it was killed. Raises TooLate; not to be repeated."""
        with alarm.held():
            with alarm.heard():
                ended = self.ends(until)
            if not ended:
                raise TooLate(f"{self._name} did not end in time")
            code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
            self._pid = 0
        return code if code >= 0 else 128 - code

    def end(self) -> None:
        """Kill it and its process group, unless `wait` has seen its end."""
        with alarm.held():
            if not self._pid:
                return
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)  # not reaped yet, so the group is still ours
            if self.ends(time.monotonic() + _DIES_WITHIN_S):
                os.waitpid(self._pid, 0)
            self._pid = 0


def ends(pid: int, until: float) -> bool:
    """Wait for the end of our child, which is not reaped by this. False when that is too late."""
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
    """Start the program; its pid, once it is executed. Raises OSError.

    Not posix_spawn, which has no parent-death signal. This process has one thread: it may fork.
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
    argv: Sequence[str], env: Mapping[str, str], quiet: bool, first: Callable[[], None] | None,
    parent: int, report_fd: int,
) -> NoReturn:  # fmt: skip
    """The child's part: nothing of ours may run on in it, whatever happens."""
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
