"""When a container is worth capturing: the six forms of `capture-when`.

Each waits until its condition is met. The caller cancels it when the container ends, and bounds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from typing import TYPE_CHECKING, assert_never

from shim.capture import workload
from shim.contract.errors import NeverReady
from shim.contract.paths import CONTROL, READY_FILE
from shim.kernel.beneath import open_dir, open_in_root
from shim.nri.annotations import ExecReady, FileReady, HttpReady, LogReady, SignalReady, TcpReady

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shim.capture.source import Source
    from shim.nri.annotations import Readiness

_EVERY_S = 0.1
"""Between two looks where nothing tells us of a change: a file's directory may not exist yet."""
_EXEC_EVERY_S = 1.0
_EXEC_S = 10.0
_LINE_BYTES = 4096
"""The most of one line that a regular expression is tried on: it holds up the event loop."""


async def wait_until_ready(source: Source, condition: Readiness, *, within_s: float) -> None:
    """Return when `condition` is met. Raises NeverReady after `within_s` seconds."""
    try:
        async with asyncio.timeout(within_s):
            await _wait(source, condition, within_s)
    except (TimeoutError, workload.WorkloadRefused, OSError) as error:
        raise NeverReady(
            "the container did not become ready", container=source.container,
            why=str(error) or f"{condition} was not met within {within_s:g} s",
            do="Check the pod's quickthaw.io/capture-when annotation.",
        ) from error  # fmt: skip


async def _wait(source: Source, condition: Readiness, within_s: float) -> None:
    match condition:
        case HttpReady(port, path):
            await workload.request(
                source, "http", port, method="GET", target=path, every_s=_EVERY_S,
                within_s=within_s,
            )  # fmt: skip
        case TcpReady(port):
            await workload.request(source, "tcp", port, every_s=_EVERY_S, within_s=within_s)
        case FileReady(path):
            await _until(lambda: _exists_in(source, path))
        case SignalReady():
            await _until(lambda: os.path.lexists(f"{CONTROL}/{source.container}/{READY_FILE}"))
        case ExecReady(argv):
            await _exec(source, argv)
        case LogReady(pattern):
            await _log(source, re.compile(pattern))
        case _:
            assert_never(condition)


async def _until(condition: Callable[[], bool]) -> None:
    # No inotify: the directory need not exist yet, and it is in another mount namespace.
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(_EVERY_S)


def _exists_in(source: Source, path: str) -> bool:
    """Whether the container has `path`. Its links are followed as it would: never out of it."""
    try:
        with (
            open_dir(f"/proc/{source.pid}/root") as root,
            open_in_root(root.fileno(), path, os.O_PATH),
        ):
            return True
    except OSError:
        return False


async def _exec(source: Source, argv: tuple[str, ...]) -> None:
    while True:
        try:
            await workload.execute(source, argv, within_s=_EXEC_S)
        except workload.WorkloadRefused:
            await asyncio.sleep(_EXEC_EVERY_S)
        else:
            return


async def _log(source: Source, pattern: re.Pattern[str]) -> None:
    log = _Log(source.log_path)
    await _until(lambda: any(pattern.search(text) for text in log.new_lines()))


class _Log:
    """A container's log file, read on from where we were. kubelet may rotate it."""

    def __init__(self, path: str) -> None:
        self._path, self._seen, self._inode = path, 0, 0

    def new_lines(self) -> Iterator[str]:
        """The text of each whole line that came since. Raises OSError."""
        with contextlib.suppress(FileNotFoundError), open(self._path, "rb") as file:
            if (inode := os.fstat(file.fileno()).st_ino) != self._inode:
                self._seen, self._inode = 0, inode
            file.seek(self._seen)
            while line := file.readline(_LINE_BYTES):
                if not line.endswith(b"\n") and len(line) < _LINE_BYTES:
                    return  # still being written
                self._seen += len(line)
                yield _message(line)


def _message(line: bytes) -> str:
    """The text of a line of a CRI log: `TIME STREAM TAG TEXT`."""
    return line.decode(errors="replace").rstrip("\n").split(" ", 3)[-1]
