"""Rule 4 of the gate for GPUs: makes a fact of the GPUs that a container has. Pure and lean.

A container without NVIDIA devices has the fact `"none"`. A container with such devices, on a node
whose GPUs cannot be read, has no fact, and a missing fact does not fit: nobody restores the
container or takes it for a container without GPUs. The driver's version must be equal: the process
has that very libcuda mapped.
"""

from __future__ import annotations

from shim.contract import jsontext
from shim.contract.jsontext import canonical
from shim.gate.facts import entries, section

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    Gpu = Mapping[str, object]

NONE = canonical("none")
_DEVICE = "/dev/nvidia"
_NO_GPU = ("", "void", "none")


def fact(spec: Mapping[str, Any], inventory: Mapping[str, Any] | None) -> str | None:
    """Returns the fact of the container of an OCI spec; None when its GPUs are not known.

    inventory: the node's GPUs by `shim.kernel.nvml`: `driver`, and `gpus` with `minor`, `name`,
    `memory_bytes`, `mig`; None when unreadable. `{"gpus": []}` for a node without GPUs.
    """
    minors = _minors(spec)
    if not _has_devices(spec) and (_asks_for_none(spec) or _is_empty(inventory)):
        return NONE
    if inventory is None:
        return None
    listed: Sequence[Gpu] = inventory.get("gpus") or ()
    # Without a device in the spec the runtime adds the GPUs that the environment names: take all.
    chosen = [gpu for gpu in listed if minors is None or gpu.get("minor") in minors]
    if not chosen or (minors is not None and len(chosen) != len(minors)):
        return None
    described = sorted(
        canonical([gpu.get("name"), gpu.get("memory_bytes"), gpu.get("mig")]) for gpu in chosen
    )
    return canonical(
        {"driver": inventory.get("driver"), "gpus": [jsontext.parse(each) for each in described]}
    )


def fits(captured: str, wanted: str) -> bool:
    """Whether a process with the captured GPUs can go on with the wanted GPUs."""
    return captured == wanted and all(gpu[2] is False for gpu in _gpus(captured))


def _gpus(text: str) -> list[list[object]]:
    """Returns name, memory and MIG of each GPU; an unreadable fact is a GPU that fits nowhere."""
    try:
        value = jsontext.parse(text)
        found = [] if value == "none" else [list(gpu) for gpu in value["gpus"]]
    except (ValueError, TypeError, KeyError):
        return [[None, None, None]]
    return found if all(len(gpu) == 3 for gpu in found) else [[None, None, None]]


def _has_devices(spec: Mapping[str, Any]) -> bool:
    devices = entries(section(spec, "linux"), "devices")
    return any(_is_gpus(str(device.get("path"))) for device in devices)


def _is_gpus(path: str) -> bool:
    name = path.removeprefix(_DEVICE)
    return path == "/dev/dxg" or (name != path and (name.startswith("-caps/") or "/" not in name))


def _minors(spec: Mapping[str, Any]) -> set[int] | None:
    """Returns the numbers of the GPUs in the spec; None when it has no NVIDIA device at all."""
    if not _has_devices(spec):
        return None
    devices = entries(section(spec, "linux"), "devices")
    paths = (str(device.get("path")) for device in devices)
    numbers = (path.removeprefix(_DEVICE) for path in paths if path.startswith(_DEVICE))
    return {int(number) for number in numbers if number.isascii() and number.isdecimal()}


def _asks_for_none(spec: Mapping[str, Any]) -> bool:
    """Whether the environment asks NVIDIA's runtime for no GPU. Most never name the variable."""
    environment = section(spec, "process").get("env")
    listed = environment if isinstance(environment, list) else []
    asked = [str(item).partition("=")[2] for item in listed
             if str(item).startswith("NVIDIA_VISIBLE_DEVICES=")]  # fmt: skip
    return all(value in _NO_GPU for value in asked)


def _is_empty(inventory: Mapping[str, Any] | None) -> bool:
    return inventory is not None and not inventory.get("gpus")
