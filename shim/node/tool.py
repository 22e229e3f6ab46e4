"""Runs other programs for the daemon: short environment, deadline, always reaped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shim.kernel import lineage

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

ENVIRONMENT: Final = {
    "LANG": "C.UTF-8",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
}
_TAIL_BYTES = 4096
_CHUNK_BYTES = 64 << 10
_MOST_BYTES = 8 << 20
"""The limit for a program's output. Of more output only the end is kept, for messages."""
_DIES_WITHIN_S = 5.0
"""The limit for the end of a killed program. After that we leave a program in the kernel alone."""
_LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class Ended:
    """status: 128 + signal if a signal killed the program. output: all that it printed."""

    status: int
    output: bytes

    @property
    def tail(self) -> str:
        """The end of the output, for messages."""
        return self.output[-_TAIL_BYTES:].decode(errors="replace").strip()


def run(
    argv: Sequence[str],
    *,
    within_s: float,
    environment: Mapping[str, str] | None = None,
    held_fd: int | None = None,
    release: Callable[[], None] | None = None,
    before_kill: Callable[[int], object] | None = None,
) -> Ended:
    """Run a program to its end, for callers in a thread of their own.

    environment: added to ENVIRONMENT. held_fd: a lock that the program holds while it runs.
    release: called again and again while the killed program does not end, to remove the cause that
    holds the program in the kernel. before_kill: called with the pid of a program that is late, to
    stop its descendants where their end does no harm. Raises TimeoutError after killing the program
    and all its descendants, OSError if the program cannot be executed.
    """
    process = subprocess.Popen(
        list(argv), env={**ENVIRONMENT, **(environment or {})}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        pass_fds=() if held_fd is None else (held_fd,),
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=within_s)
    except subprocess.TimeoutExpired:
        if before_kill:
            before_kill(process.pid)
        left = _end(process, release)
        more = f", and did not die of SIGKILL: {left}" if left else ""
        raise TimeoutError(f"{argv[0]} did not end within {within_s:.4g} s{more}") from None
    except BaseException:
        _end(process, release)
        raise
    return Ended(_status(process.returncode), output)


def _end(process: subprocess.Popen[bytes], release: Callable[[], None] | None) -> str:
    """Kill a program and its descendants. Returns the processes that do not end in time.

    All have the signal before the release: none of them runs a step of its own any more.
    """
    with contextlib.ExitStack() as stack:
        fds = {process.pid: os.pidfd_open(process.pid)}  # not reaped: the number is its own
        stack.callback(os.close, fds[process.pid])
        for pid in lineage.descendants(process.pid):
            with contextlib.suppress(ProcessLookupError):
                fds[pid] = os.pidfd_open(pid)
                stack.callback(os.close, fds[pid])
        for fd in fds.values():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # processes that were started meanwhile
        until = time.monotonic() + _DIES_WITHIN_S
        while alive := [pid for pid, fd in fds.items() if not _has_ended(fd)]:
            if time.monotonic() > until:
                break
            if release:
                release()
        if process.stdout:
            process.stdout.close()
        if process.pid not in alive:
            process.wait()
    return ", ".join(f"process {pid}" for pid in alive)


def _has_ended(pid_fd: int) -> bool:
    """Wait a moment. Returns whether the process has ended."""
    return bool(select.select([pid_fd], [], [], _LOOK_S)[0])


async def run_async(
    argv: Sequence[str], *, within_s: float, pass_fds: Collection[int] = ()
) -> Ended:
    """Run a program on the event loop; a cancellation kills the program, too.

    pass_fds: descriptors that the program inherits, under the same numbers.
    """
    process = await asyncio.create_subprocess_exec(
        *argv, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True, pass_fds=pass_fds,
    )  # fmt: skip
    try:
        async with asyncio.timeout(within_s):
            assert process.stdout is not None  # noqa: S101 - it is a pipe
            output = await _bounded(process.stdout)
            await process.wait()
    except TimeoutError:
        raise TimeoutError(f"{argv[0]} did not end within {within_s:g} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    return Ended(_status(process.returncode or 0), output)


async def _bounded(stream: asyncio.StreamReader) -> bytes:
    """Returns the output, or only its end: a command of a pod may print for ever."""
    output = bytearray()
    while chunk := await stream.read(_CHUNK_BYTES):
        output += chunk
        if len(output) > _MOST_BYTES:
            del output[:-_TAIL_BYTES]
    return bytes(output)


def _status(returncode: int) -> int:
    return returncode if returncode >= 0 else 128 - returncode
