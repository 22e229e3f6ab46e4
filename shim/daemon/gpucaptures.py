"""The daemon's part of captures with GPUs: findings, and what a killed daemon has left."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from shim.capture import gpus
from shim.contract.errors import GpuLost, GpuNotCapturable
from shim.contract.paths import GPU_PAYLOAD
from shim.gpu import engine, support
from shim.source.source import own_freezer

if TYPE_CHECKING:
    from collections.abc import Callable

    from shim.capture.sequence import Taken
    from shim.source.source import Source


async def findings(source_of: Callable[[], Source]) -> list[dict[str, object]]:
    """Returns the rows of `shim.gpu.support` for a running container; none where no GPU is in use.

    source_of: reads the container's spec from the disk.
    """
    try:
        source = await asyncio.to_thread(source_of)
        if source.gpus == ():
            return []
        return (await asyncio.to_thread(gpus.examine, source)).rows
    except (GpuNotCapturable, OSError) as error:
        return [support.unreadable(str(error))]


async def recovered(container: str, source_of: Callable[[], Source]) -> list[int]:
    """Gives its GPUs back to a container that a daemon which was killed had checkpointed.

    Returns the processes that it was about. Raises GpuLost, OSError, ValueError.
    """
    if not engine.left_over(container):
        return []
    source = await asyncio.to_thread(source_of)
    listed = own_freezer(source).pids
    return await asyncio.to_thread(engine.recover, container, listed, gpus.spawn)


def facts_of(taken: Taken) -> dict[str, str]:
    """Returns the fact of the manifest about CUDA processes, where there are some."""
    return {GPU_PAYLOAD: taken.gpus.encode()} if taken.gpus else {}


def lost_behind(error: BaseException) -> GpuLost | None:
    """Returns the error for which we killed the container, whose end has then cancelled us."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, GpuLost):
        found = found.__context__
    return found
