"""The lean door to other programs: an argument list, a deadline, always reaped.

For the swap path, where importing `subprocess` costs 10 ms. The child stays in our process tree
and in our session (a restored init must be inherited by containerd's shim), but leads a process
group of its own, so that everything which has not left it can be killed at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_RESET = (signal.SIGPIPE, signal.SIGXFSZ)  # the interpreter ignores them, programs expect not

_NO_STDIO = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]


class TooLate(Exception):
    """The program did not end before its deadline and was killed."""


def run(
    argv: Sequence[str],
    *,
    until: float,
    env: Mapping[str, str] | None = None,
    quiet: bool = False,
) -> int:
    """Run `argv` (argv[0] is searched in PATH) with our own stdin, stdout and stderr.

    quiet: with /dev/null instead, for what must not reach the pod's log. until: deadline on
    `time.monotonic`. Returns the exit status; 128 + signal when it was killed.
    Raises TooLate after killing its process group, OSError when it cannot be executed.
    """
    environment = os.environ if env is None else env
    actions = _NO_STDIO if quiet else ()
    pid = os.posix_spawnp(
        argv[0], list(argv), environment, file_actions=actions, setpgroup=0, setsigdef=_RESET
    )
    try:
        wait_fd = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(wait_fd, select.POLLIN)
            if not poll.poll(max(0, until - time.monotonic()) * 1000):
                raise TooLate(f"{argv[0]} did not end in time")
        finally:
            os.close(wait_fd)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # not reaped yet, so the group is still ours
        os.waitpid(pid, 0)
        raise
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if code >= 0 else 128 - code
