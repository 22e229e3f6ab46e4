"""Calls into the workload: readiness probes, quiesce and resume, over its network or by exec."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from shim.capture import tool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shim.capture.source import Source

_PREFIX = str(Path(__file__).parents[2])
_PROBE = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); "
    "from shim.network.probe import main; sys.exit(main())"
)


class WorkloadRefused(Exception):
    """The call failed. The message says what the workload did."""


async def request(
    source: Source, kind: str, port: int, *, method: str = "", target: str = "",
    every_s: float = 0, within_s: float,
) -> None:  # fmt: skip
    """An HTTP request or TCP connection (kind `http` or `tcp`) to the pod's port.

    every_s: seconds between tries, 0 for one try. Raises WorkloadRefused.
    """
    wanted = {
        "netns": f"/proc/{source.pid}/ns/net", "kind": kind, "port": port, "method": method,
        "target": target, "every_s": every_s, "within_s": within_s,
    }  # fmt: skip
    argv = [sys.executable, "-ISE", "-c", _PROBE, _PREFIX, json.dumps(wanted)]
    await _succeed(argv, within_s + 5)


async def execute(source: Source, argv: Sequence[str], *, within_s: float) -> None:
    """Run a command in the container, as its user. Raises WorkloadRefused."""
    await _succeed([*source.runtime, "exec", source.container, *argv], within_s)


async def _succeed(argv: Sequence[str], within_s: float) -> None:
    try:
        ended = await tool.run_async(argv, within_s=within_s)
    except (OSError, TimeoutError) as error:
        raise WorkloadRefused(str(error)) from error
    if ended.status:
        raise WorkloadRefused(ended.tail or f"status {ended.status}")
