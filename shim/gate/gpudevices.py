"""GPUs of one kind are as good as one another: their names in a spec, but not which one it is.

A device plugin gives each pod other GPUs of the node. Which ones grants no other power and makes no
other workload, so the first GPU of a spec is `/dev/nvidia#0` in what is compared, whatever its
number. How many there are, and of which model, stays (see `shim.gate.gpu`). Lean.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from shim.oci.spec import Spec

DEVICE = "/dev/nvidia"
VISIBLE = "NVIDIA_VISIBLE_DEVICES"


def devices(spec: Spec) -> Any:
    """The spec's devices, each GPU by its place among the GPUs."""
    listed = spec.linux.get("devices")
    places = _places(listed)
    if not places or not isinstance(listed, list):
        return listed
    return [
        {**each, "path": f"{DEVICE}#{places[key]}", "minor": f"#{places[key]}"}
        if isinstance(each, dict) and (key := _gpu(each)) in places
        else each
        for each in listed
    ]


def rules(spec: Spec) -> Any:
    """The device rules in their order, those about exactly one GPU by its place."""
    listed = spec.resources.get("devices")
    places = _places(spec.linux.get("devices"))
    if not places or not isinstance(listed, list):
        return listed
    return [
        {**each, "minor": f"#{places[key]}"}
        if isinstance(each, dict)
        and each.get("type") == "c"
        and (key := (each.get("major"), each.get("minor"))) in places
        else each
        for each in listed
    ]


def visible(variables: Mapping[str, str]) -> dict[str, str]:
    """The variable that a device plugin sets, with the number of GPUs; empty where there is none.

    `all`, `none` and the like stay: a person wrote them.
    """
    names = variables.get(VISIBLE, "").split(",")
    if not all(name.startswith("GPU-") or (name.isascii() and name.isdecimal()) for name in names):
        return {}
    return {VISIBLE: f"<{len(names)} GPUs>"}


def _places(listed: object) -> dict[object, int]:
    """Device number of each GPU to its place in the list."""
    found = listed if isinstance(listed, list) else []
    keys = [key for each in found if isinstance(each, dict) and (key := _gpu(each))]
    return {key: place for place, key in enumerate(dict.fromkeys(keys))}


def _gpu(device: Mapping[str, Any]) -> tuple[int, int] | None:
    """Major and minor of a device that is a whole GPU, by a path that says the same number."""
    number = str(device.get("path")).removeprefix(DEVICE)
    major, minor = device.get("major"), device.get("minor")
    is_one = number.isascii() and number.isdecimal() and device.get("type") == "c"
    if is_one and type(major) is int and type(minor) is int and int(number) == minor:
        return major, minor
    return None
