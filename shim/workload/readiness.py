"""Waits until a container is worth capturing: the six forms of `capture-when`.

Each waits until its condition is met. The caller cancels the wait when the container ends, and
bounds the time.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING, assert_never

from shim.contract.errors import NeverReady
from shim.contract.paths import CONTROL, READY_FILE
from shim.kernel.beneath import open_in_root
from shim.node import tool
from shim.workload import logwatch, requests
from shim.workload.annotations import (
    ExecReady,
    FileReady,
    HttpReady,
    LogReady,
    SignalReady,
    TcpReady,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from shim.source.source import Source
    from shim.workload.annotations import Readiness

_EVERY_S = 0.1
"""The pause between two looks for which there is no event: a directory may not exist yet."""
_EXEC_EVERY_S = 1.0
_EXEC_S = 10.0
_TOOL_S = 10.0
"""Added to the limit of the condition: the caller reports the condition's own timeout."""
_KILLED, _OUT_OF_TIME = 128 + signal.SIGKILL, 128 + signal.SIGXCPU


async def wait_until_ready(source: Source, condition: Readiness, *, within_s: float) -> None:
    """Return when `condition` is met. Raises NeverReady after `within_s` seconds."""
    try:
        async with asyncio.timeout(within_s):
            await _wait(source, condition, within_s)
    except (TimeoutError, requests.WorkloadRefused, OSError) as error:
        raise NeverReady(
            "the container did not become ready", about=source.container,
            why=str(error) or f"{condition} was not met within {within_s:g} s",
            do="Check the pod's quickthaw.io/capture-when annotation.",
        ) from error  # fmt: skip


async def _wait(source: Source, condition: Readiness, within_s: float) -> None:
    match condition:
        case HttpReady(port, path):
            await requests.request(
                source, "http", port, method="GET", target=path, every_s=_EVERY_S,
                within_s=within_s,
            )  # fmt: skip
        case TcpReady(port):
            await requests.request(source, "tcp", port, every_s=_EVERY_S, within_s=within_s)
        case FileReady(path):
            await _until(lambda: _exists_in(source, path))
        case SignalReady():
            await _until(lambda: os.path.lexists(f"{CONTROL}/{source.container}/{READY_FILE}"))
        case ExecReady(argv):
            await _exec(source, argv)
        case LogReady(pattern):
            await _log(source, pattern, within_s)
        case _:
            assert_never(condition)


async def _until(condition: Callable[[], bool]) -> None:
    # No inotify: the directory need not exist yet, and lies in another mount namespace.
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(_EVERY_S)


def _exists_in(source: Source, path: str) -> bool:
    """Returns whether the container has `path`. No link leads out of the container."""
    try:
        with (
            source.process.open("root", os.O_PATH | os.O_DIRECTORY) as root,
            open_in_root(root.fileno(), path, os.O_PATH),
        ):
            return True
    except OSError:
        return False


async def _exec(source: Source, argv: tuple[str, ...]) -> None:
    while True:
        try:
            await requests.execute(source, argv, within_s=_EXEC_S)
        except requests.WorkloadRefused:
            await asyncio.sleep(_EXEC_EVERY_S)
        else:
            return


async def _log(source: Source, pattern: str, within_s: float) -> None:
    within_s += _TOOL_S
    argv = [sys.executable, "-ISE", logwatch.__file__, str(os.getpid()), f"{within_s:.3f}"]
    ended = await tool.run_async([*argv, pattern, source.log_path], within_s=within_s)
    if ended.status in (_KILLED, _OUT_OF_TIME):
        why = f"its expression used {logwatch.CPU_S} s of the processor's time on the log"
        raise TimeoutError(f"{pattern!r:.80}: {why}")
    if ended.status:
        raise TimeoutError(f"its log cannot be watched: {ended.tail}")
