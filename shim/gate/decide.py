"""The decision: may one of these snapshots become this container? Pure.

A refusal is a value with every difference in it, not only the first. The daemon decides with
`decide` from what NRI shows of a container; `quickthaw-runc` has the whole spec right before the
swap and has the last word with `compare_power`. Lean.
"""

from __future__ import annotations

import json

from shim.contract.manifest import canonical
from shim.gate.facts import POWER_FACTS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from shim.contract.manifest import Manifest
    from shim.contract.names import SnapshotId

UNSET = "unset"


class Refusal:
    """One fact that the snapshot and the container do not agree in."""

    __slots__ = ("captured", "fact", "wanted")

    def __init__(self, fact: str, captured: str, wanted: str) -> None:
        self.fact, self.captured, self.wanted = fact, captured, wanted

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Refusal) and str(other) == str(self)

    def __hash__(self) -> int:
        return hash(str(self))

    def __str__(self) -> str:
        """For the pod's author: of lists and objects only what is not in both."""
        captured, wanted = _without_common(self.captured, self.wanted)
        return f"{self.fact}: the snapshot has {captured}, the pod asks for {wanted}"

    def __repr__(self) -> str:
        return f"Refusal({self.fact!r}, {self.captured!r}, {self.wanted!r})"


def _without_common(captured: str, wanted: str) -> tuple[str, str]:
    try:
        have, want = _differences(json.loads(captured), json.loads(wanted))
    except ValueError:
        return captured, wanted  # one of them is UNSET
    return canonical(have), canonical(want)


def _differences(have: object, want: object) -> tuple[object, object]:
    if isinstance(have, list) and isinstance(want, list):
        left: list[object] = [item for item in have if item not in want]
        right: list[object] = [item for item in want if item not in have]
        # Lists of the same items differ in their order, and then the whole is the difference.
        return (left, right) if left or right else (have, want)
    if isinstance(have, dict) and isinstance(want, dict):
        pairs = {
            name: _differences(have.get(name), want.get(name))
            for name in have.keys() | want.keys()
            if have.get(name) != want.get(name)
        }
        return (
            {name: pair[0] for name, pair in pairs.items() if name in have},
            {name: pair[1] for name, pair in pairs.items() if name in want},
        )
    return have, want


class Match:
    """The snapshot to start from."""

    __slots__ = ("manifest",)

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest


class Refused:
    """Candidates, but none that fits. refusals: all differences from the newest of them."""

    __slots__ = ("refusals", "snapshot")

    def __init__(self, snapshot: SnapshotId, refusals: Sequence[Refusal]) -> None:
        self.snapshot, self.refusals = snapshot, tuple(refusals)

    def __str__(self) -> str:
        return f"snapshot {self.snapshot[:12]} does not fit: " + "; ".join(map(str, self.refusals))


class NoSnapshot:
    """No candidate at all."""

    __slots__ = ()


class Request:
    """What is known of the container that is to start.

    key: its match key. facts: those that are known already, compared where given; all of them
    must be in the snapshot. memory_limit_bytes: 0 for none. any_namespace: the node's
    configuration allows snapshots of other Kubernetes namespaces.
    """

    __slots__ = (
        "any_namespace",
        "arch",
        "facts",
        "kernel",
        "key",
        "memory_limit_bytes",
        "namespace",
    )

    def __init__(
        self, *, namespace: str, key: str, arch: str, kernel: str,
        facts: Mapping[str, str], memory_limit_bytes: int = 0, any_namespace: bool = False,
    ) -> None:  # fmt: skip
        self.namespace, self.key, self.arch, self.kernel = namespace, key, arch, kernel
        self.facts, self.memory_limit_bytes = facts, memory_limit_bytes
        self.any_namespace = any_namespace


def decide(request: Request, candidates: Iterable[Manifest]) -> Match | Refused | NoSnapshot:
    """The first of `candidates` (newest first) that fits.

    The candidates are those that the pod named, or those with its match key.
    """
    newest: Refused | None = None
    for manifest in candidates:
        if not (refusals := refusals_of(request, manifest)):
            return Match(manifest)
        newest = newest or Refused(manifest.id, refusals)
    return newest or NoSnapshot()


def refusals_of(request: Request, manifest: Manifest) -> list[Refusal]:
    """Every reason against this snapshot; empty when it fits."""
    found = compare_facts(manifest.facts, request.facts, request.facts)
    if manifest.key != request.key and not found:
        found.append(Refusal("key", manifest.key, request.key))
    if manifest.source.namespace != request.namespace and not request.any_namespace:
        found.append(Refusal("namespace", manifest.source.namespace, request.namespace))
    if manifest.software.arch != request.arch:
        found.append(Refusal("arch", manifest.software.arch, request.arch))
    if _release(request.kernel) < _release(manifest.software.kernel):
        found.append(Refusal("kernel", manifest.software.kernel, request.kernel))
    return found + compare_memory(manifest.requires.memory_bytes, request.memory_limit_bytes)


def compare_power(captured: Mapping[str, str], wanted: Mapping[str, str]) -> list[Refusal]:
    """Rule 2: whatever grants power must be equal. A fact that is missing is a refusal, too."""
    return compare_facts(captured, wanted, POWER_FACTS)


def compare_facts(
    captured: Mapping[str, str], wanted: Mapping[str, str], names: Iterable[str]
) -> list[Refusal]:
    """A refusal for each of `names` that is not in both with the same value."""
    return [
        Refusal(name, captured.get(name, UNSET), wanted.get(name, UNSET))
        for name in sorted(names)
        if name not in captured or name not in wanted or captured[name] != wanted[name]
    ]


def compare_memory(needed_bytes: int, limit_bytes: int) -> list[Refusal]:
    """What was in memory at capture must fit into the limit. limit_bytes: 0 for none."""
    if limit_bytes and limit_bytes < needed_bytes:
        return [Refusal("memory", f"{needed_bytes} bytes in use", f"a limit of {limit_bytes}")]
    return []


def _release(kernel: str) -> tuple[int, ...]:
    """`6.18.2-amd64` as (6, 18): what a release adds to the interface comes with these two."""
    numbers = kernel.split(".")[:2]
    return tuple(int(number) if number.isdecimal() else 0 for number in numbers)
