"""Has CRIU learn the kernel's features before a container waits for CRIU.

The first CRIU after a boot probes the kernel for 35 to 95 ms and keeps the result in
/run/criu.kdat: in a frozen window, or in a pod's start, that would be time lost.
"""

from __future__ import annotations

import logging
from pathlib import Path

from shim.node import tool

log = logging.getLogger(__name__)

_KEPT = Path("/run/criu.kdat")
_CHECK_S = 30.0


async def learn(criu: str) -> None:
    """Have CRIU probe the kernel, unless done since the boot. A failure only costs time."""
    if _KEPT.exists():  # noqa: ASYNC240 - /run is in memory
        return
    try:
        await tool.run_async([criu, "check"], within_s=_CHECK_S)
    except (OSError, TimeoutError) as error:
        log.warning("cannot run %s check: %s; is CRIU installed?", criu, error)
