"""The daemon's door to other programs: short environment, deadline, always reaped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

ENVIRONMENT: Final = {
    "LANG": "C.UTF-8",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
}
_TAIL_BYTES = 4096
_CHUNK_BYTES = 64 << 10
_MOST_BYTES = 8 << 20
"""Of what a program prints. Of more only the end is kept, for messages."""


@dataclass(frozen=True, slots=True)
class Ended:
    """status: 128 + signal when it was killed. output: what it printed."""

    status: int
    output: bytes

    @property
    def tail(self) -> str:
        """The end of what it printed, for messages."""
        return self.output[-_TAIL_BYTES:].decode(errors="replace").strip()


def run(
    argv: Sequence[str], *, within_s: float, environment: Mapping[str, str] | None = None,
    held_fd: int | None = None,
) -> Ended:  # fmt: skip
    """Run one program to its end, for callers in a thread of their own.

    environment: what it gets beside ENVIRONMENT. held_fd: a lock that it holds while it runs.
    Raises TimeoutError after killing its process group, OSError when it cannot be executed.
    """
    with subprocess.Popen(
        list(argv), env={**ENVIRONMENT, **(environment or {})}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        pass_fds=() if held_fd is None else (held_fd,),
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=within_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise TimeoutError(f"{argv[0]} did not end within {within_s:g} s") from None
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return Ended(_status(process.returncode), output)


async def run_async(
    argv: Sequence[str], *, within_s: float, pass_fds: Collection[int] = ()
) -> Ended:  # fmt: skip
    """The same on the event loop; being cancelled kills the program, too.

    pass_fds: descriptors that the program has, under the same numbers.
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
    """All that it gives, or the end of it: a command of a pod's may print for ever."""
    output = bytearray()
    while chunk := await stream.read(_CHUNK_BYTES):
        output += chunk
        if len(output) > _MOST_BYTES:
            del output[:-_TAIL_BYTES]
    return bytes(output)


def _status(returncode: int) -> int:
    return returncode if returncode >= 0 else 128 - returncode
