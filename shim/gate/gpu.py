"""Rule 4 of the gate for GPUs: makes a fact of the GPUs that a container has. Pure and lean.

A container without NVIDIA devices has the fact `"none"`. A container with such devices, on a node
whose GPUs cannot be read, has no fact, and a missing fact does not fit: nobody restores the
container or takes it for a container without GPUs. The driver's version must be equal: the process
has that very libcuda mapped.
"""

from __future__ import annotations

from shim.contract import jsontext
from shim.contract.jsontext import canonical
from shim.gate import gpudevices
from shim.gate.gpudevices import VISIBLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from shim.oci.spec import Spec

    Gpu = Mapping[str, object]

NONE = canonical("none")
HOST_FACTS = ("gpu_exclusive", "gpu_mps", "gpu_host_network")
_DEVICE = "/dev/nvidia"
_NO_GPU = ("", "void", "none")


def fact(spec: Spec, inventory: Mapping[str, Any] | None) -> str | None:
    """Returns the fact of the container of an OCI spec; None when its GPUs are not known.

    inventory: the node's GPUs by `shim.kernel.nvml`: `driver`, and `gpus` with `minor`, `name`,
    `memory_bytes`, `mig`, `uuid`; None when unreadable. `{"gpus": []}` for a node without GPUs.
    """
    found = chosen(spec, inventory)
    if found is None or inventory is None:
        return NONE if found == [] else None
    if not found:
        return NONE
    described = sorted(
        canonical([gpu.get("name"), gpu.get("memory_bytes"), gpu.get("mig")]) for gpu in found
    )
    return canonical(
        {"driver": inventory.get("driver"), "gpus": [jsontext.parse(each) for each in described]}
    )


def chosen(spec: Spec, inventory: Mapping[str, Any] | None) -> list[Gpu] | None:
    """Returns the GPUs of an OCI spec's container by their minors; None if they are not known."""
    minors = _minors(spec)
    if not _has_devices(spec) and (_asks_for_none(spec) or _is_empty(inventory)):
        return []
    if inventory is None:
        return None
    listed: Sequence[Gpu] = inventory.get("gpus") or ()
    # Without a device in the spec the runtime adds those that the environment asks for.
    found = _visible(spec, listed) if minors is None else [
        gpu for gpu in listed if gpu.get("minor") in minors
    ]  # fmt: skip
    if not found or (minors is not None and len(found) != len(minors)):
        return None
    return sorted(found, key=lambda gpu: str(gpu.get("minor")).zfill(8))


def host_facts(spec: Spec, found: Sequence[Gpu] | None, namespaces: str) -> dict[str, str]:
    """Returns facts that rule out a restore of a checkpointed process, NONE where one is absent.

    found: as of `chosen`; of a container without GPUs, or with unknown ones, all are NONE, and the
    fact `gpu` tells them apart. namespaces: the fact of that name.
    """
    if not found:
        return dict.fromkeys(HOST_FACTS, NONE)
    mps = sorted(each.partition("=")[0] for each in spec.env if each.startswith("CUDA_MPS_"))
    exclusive = [gpu.get("uuid") for gpu in found if gpu.get("exclusive")]
    shared = jsontext.parse(namespaces).get("network") == "host"
    return {
        "gpu_exclusive": canonical(exclusive) if exclusive else NONE,
        "gpu_mps": canonical(mps) if mps else NONE,
        "gpu_host_network": canonical("the node's network") if shared else NONE,
    }


def pairs(captured: Sequence[Gpu], new: Sequence[Gpu]) -> list[list[str]] | None:
    """Which captured GPU becomes which, as UUIDs: each one of the same model and memory.

    None when there is no such map, or a UUID is not known.
    """
    left, found = list(new), []
    for old in captured:
        like = [each for each in left if _kind(each) == _kind(old)]
        same = [each for each in like if each.get("uuid") == old.get("uuid")]
        if not like:
            return None
        taken = (same or like)[0]
        left.remove(taken)
        found.append([str(old.get("uuid") or ""), str(taken.get("uuid") or "")])
    return None if left or not all(all(pair) for pair in found) else found


def _kind(gpu: Gpu) -> tuple[object, object]:
    return gpu.get("name"), gpu.get("memory_bytes")


def _visible(spec: Spec, listed: Sequence[Gpu]) -> list[Gpu]:
    """Those that the environment names, by their place on the node or their UUID; else all."""
    values = _asked(spec)
    names = values[-1].split(",") if values else []
    if not gpudevices.visible({VISIBLE: ",".join(names)}):
        return list(listed)
    return [
        gpu for place, gpu in enumerate(listed) if str(place) in names or gpu.get("uuid") in names
    ]


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


def _has_devices(spec: Spec) -> bool:
    return any(_is_gpus(str(device.get("path"))) for device in spec.devices)


def _is_gpus(path: str) -> bool:
    name = path.removeprefix(_DEVICE)
    return path == "/dev/dxg" or (name != path and (name.startswith("-caps/") or "/" not in name))


def _minors(spec: Spec) -> set[int] | None:
    """Returns the numbers of the GPUs in the spec; None when it has no NVIDIA device at all."""
    if not _has_devices(spec):
        return None
    paths = (str(device.get("path")) for device in spec.devices)
    numbers = (path.removeprefix(_DEVICE) for path in paths if path.startswith(_DEVICE))
    return {int(number) for number in numbers if number.isascii() and number.isdecimal()}


def _asks_for_none(spec: Spec) -> bool:
    """Whether the environment asks NVIDIA's runtime for no GPU. Most never name the variable."""
    return all(value in _NO_GPU for value in _asked(spec))


def _asked(spec: Spec) -> list[str]:
    """Returns each value of the variable that asks NVIDIA's runtime for GPUs."""
    begins = f"{VISIBLE}="
    return [item.removeprefix(begins) for item in spec.env if item.startswith(begins)]


def _is_empty(inventory: Mapping[str, Any] | None) -> bool:
    return inventory is not None and not inventory.get("gpus")
