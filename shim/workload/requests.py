"""Calls the workload over its network or by exec: readiness probes, quiesce and resume."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from shim.node import tool

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from shim.source.source import Source

_PREFIX = str(Path(__file__).parents[2])
_START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from %s import main; sys.exit(main())"


class WorkloadRefused(Exception):
    """The call failed. The message has the workload's reaction."""


async def request(
    source: Source,
    kind: str,
    port: int,
    *,
    method: str = "",
    target: str = "",
    every_s: float = 0,
    within_s: float,
) -> None:
    """Make an HTTP request or TCP connection (kind `http` or `tcp`) to the pod's port.

    every_s: seconds between tries, 0 for a single try. The namespace is the container's, even if
    its process' number has become another's. Raises WorkloadRefused.
    """
    try:
        network_fd = source.process.network_fd()
    except ValueError as error:
        raise WorkloadRefused("the container has ended") from error
    wanted = {
        "netns": f"/proc/self/fd/{network_fd}", "kind": kind, "port": port, "method": method,
        "target": target, "every_s": every_s, "within_s": within_s, "parent": os.getpid(),
    }  # fmt: skip
    argv = [*_program("shim.workload.probe"), json.dumps(wanted)]
    await _succeed(argv, within_s + 5, (network_fd,))


async def execute(source: Source, argv: Sequence[str], *, within_s: float) -> None:
    """Run a command in the container, as its user. Raises WorkloadRefused.

    By the container's id: the runtime itself compares when its process started.
    """
    tied = [*_program("shim.node.tied"), str(os.getpid())]
    await _succeed([*tied, *source.runtime, "exec", source.container, *argv], within_s)


def _program(module: str) -> list[str]:
    return [sys.executable, "-ISE", "-c", _START % module, _PREFIX]


async def _succeed(argv: Sequence[str], within_s: float, pass_fds: Collection[int] = ()) -> None:
    try:
        ended = await tool.run_async(argv, within_s=within_s, pass_fds=pass_fds)
    except (OSError, TimeoutError) as error:
        raise WorkloadRefused(str(error)) from error
    if ended.status:
        raise WorkloadRefused(ended.tail or f"status {ended.status}")
