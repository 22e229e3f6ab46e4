"""Finds the container that a person means by a pod's name, and perhaps a namespace and a name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shim.contract.errors import NoSuchPod
from shim.daemon.control import text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shim.daemon.registry import Registry
    from shim.daemon.tracked import Tracked


def container_asked_for(
    registry: Registry,
    request: Mapping[str, Any],
    what: str,
    *,
    none_why: str,
    none_do: str,
    running: bool = False,
) -> Tracked:
    """Returns the only container that fits `pod`, `namespace` and `container` of the request.

    what, none_why, none_do: parts of the error when no container fits. running: considers only
    running containers. Raises NoSuchPod, BadRequest.
    """
    pod, namespace = text(request, "pod"), text(request, "namespace", "")
    container = text(request, "container", "")
    found = [
        tracked
        for tracked in registry
        if tracked.pod.name == pod
        and (not namespace or tracked.pod.namespace == namespace)
        and (not container or tracked.name == container)
        and (tracked.pid or not running)
    ]
    if len(found) == 1:
        return found[0]
    names = ", ".join(f"{each.pod.namespace}/{each.pod.name}/{each.name}" for each in found)
    raise NoSuchPod(
        what, about=pod,
        why=f"several containers are meant: {names}" if found else none_why,
        do="Name the namespace and the container." if found else none_do,
    )  # fmt: skip
