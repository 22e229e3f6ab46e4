"""Reads the content of a container's Secret and ConfigMap volumes, at its creation and later.

Extra threads with a deadline read the volumes: a pod's author decides how much they hold, and the
runtime does not wait for a late answer. A file beside our other files about the container keeps the
digests as of its creation, because a daemon that starts later finds only the later content.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from shim.contract.errors import NotCapturable
from shim.contract.jsontext import canonical
from shim.contract.paths import CONTAINER_VOLUME_CONTENT, CONTAINERS
from shim.gate import volumecontent
from shim.gate.key import PodValues
from shim.kernel import replace
from shim.kernel.beneath import open_dir, read_beneath

if TYPE_CHECKING:
    from collections.abc import Callable

    from shim.daemon.tracked import Identity, Tracked
    from shim.oci.spec import Spec

_MAX_BYTES = 1 << 20
_WITHIN_S = 1.0
"""Half of the time that containerd by default waits for a plugin."""
_LATE = canonical({"volumes": f"{volumecontent.NOT_READ}it took longer than {_WITHIN_S:g} s"})
_AT_ONCE = 8
_NAME = "volume-content"


def pod_of(tracked: Tracked) -> PodValues:
    """Returns the pod as the gate knows it."""
    return PodValues(
        namespace=tracked.pod.namespace, name=tracked.pod.name, uid=tracked.pod.uid,
        ips=tracked.pod.addresses, node=os.uname().nodename,
    )  # fmt: skip


async def at_creation(tracked: Tracked, spec: Spec) -> str | None:
    """Returns the fact of `shim.gate.volumecontent`, as of the first call for this container.

    None if the container has no such volume.
    """
    if not volumecontent.named(spec):
        return None
    return await _read(_remembered, tracked.container, spec, pod_of(tracked))


async def _read(how: Callable[..., str], *arguments: object) -> str:
    """Run `how` like asyncio.to_thread, but in a thread of its own that ends with the call.

    A decision must not wait for captures that occupy all of asyncio's threads. While _AT_ONCE such
    threads are stuck, nothing more is read, and pods start cold.
    """
    if sum(each.name.startswith(_NAME) for each in threading.enumerate()) >= _AT_ONCE:
        return _LATE
    pool = ThreadPoolExecutor(1, _NAME)
    try:
        async with asyncio.timeout(_WITHIN_S):
            return await asyncio.get_running_loop().run_in_executor(pool, how, *arguments)
    except TimeoutError:
        return _LATE
    finally:
        pool.shutdown(wait=False)


def _remembered(container: str, spec: Spec, pod: PodValues) -> str:
    private = f"{CONTAINERS}/{container}"
    with contextlib.suppress(OSError, ValueError), open_dir(private) as directory:
        limit = _MAX_BYTES
        return read_beneath(
            directory.fileno(), CONTAINER_VOLUME_CONTENT, limit_bytes=limit
        ).decode()  # fmt: skip
    found = volumecontent.fact(spec, pod)
    with contextlib.suppress(OSError):  # a container without this directory is not captured
        replace.put(f"{private}/{CONTAINER_VOLUME_CONTENT}", found)
    return found


async def check(tracked: Tracked, identity: Identity, spec: Spec) -> None:
    """Raises NotCapturable for volumes that have changed since the container was created.

    Its processes may have read the content from before the change, or the content from after it.
    """
    if tracked.wish.volume_content == "ignore" or not volumecontent.named(spec):
        return
    then = identity.facts.get(volumecontent.CODE)
    now = await _read(volumecontent.fact, spec, pod_of(tracked))
    if now != then or volumecontent.NOT_READ in now:
        raise NotCapturable(
            "cannot capture", about=tracked.container,
            why="a Secret or ConfigMap volume has changed since it was created, or cannot be read: "
            f"it was {then}, it is {now}",
            do="Start the pod again, or set quickthaw.io/volume-content: ignore.",
        )  # fmt: skip
