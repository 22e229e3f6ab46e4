"""Reads and writes the fact of a snapshot about the GPUs that its processes used. Lean.

One fact of the manifest, `gpu_payload`, and signed with it. A snapshot without it has none.
"""

from __future__ import annotations

from shim.contract import jsontext
from shim.contract.jsontext import canonical
from shim.contract.paths import GPU_PAYLOAD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_OF_GPU = ("memory_bytes", "name", "uuid")
_FIELDS = ("about", "gpus", "processes", "way")


class GpuPayload:
    """way: its name. processes: their numbers in the container's PID namespace. gpus: `uuid`,
    `name` and `memory_bytes` of the captured devices. about: what the way keeps, a JSON object.
    """

    __slots__ = ("about", "gpus", "processes", "way")

    def __init__(
        self,
        *,
        way: str,
        processes: list[int],
        gpus: Sequence[Mapping[str, object]],
        about: Mapping[str, object],
    ) -> None:
        self.way, self.processes, self.about = way, processes, about
        self.gpus = [{name: each[name] for name in _OF_GPU} for each in gpus]

    def encode(self) -> str:
        """The value of the fact."""
        return canonical({name: getattr(self, name) for name in _FIELDS})


def of(facts: Mapping[str, str]) -> GpuPayload | None:
    """The payload of a manifest's facts, None without. Raises ValueError for a malformed one."""
    if GPU_PAYLOAD not in facts:
        return None
    found = jsontext.parse(facts[GPU_PAYLOAD])
    if not isinstance(found, dict) or sorted(found) != list(_FIELDS):
        raise ValueError("the GPU payload is not understood")
    numbers, gpus = found["processes"], found["gpus"]
    if not isinstance(numbers, list) or not numbers or not all(type(n) is int for n in numbers):
        raise ValueError("the GPU payload names no processes")
    if not isinstance(gpus, list) or not all(map(_is_gpu, gpus)):
        raise ValueError("the GPU payload names no devices")
    if not isinstance(found["about"], dict) or not isinstance(found["way"], str):
        raise ValueError("the GPU payload has no way")
    return GpuPayload(way=found["way"], processes=numbers, gpus=gpus, about=found["about"])


def _is_gpu(value: object) -> bool:
    return isinstance(value, dict) and sorted(value) == sorted(_OF_GPU)


def octets(uuid: str) -> str:
    """`GPU-…` as 32 hexadecimal digits. Raises ValueError."""
    digits = uuid.removeprefix("GPU-").replace("-", "")
    if len(bytes.fromhex(digits)) != 16:
        raise ValueError(f"{uuid!r:.60} is no UUID of a GPU")
    return digits.lower()
