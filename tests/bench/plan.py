"""Reads from the environment which parts of the bench run: all, a quick mode, or chosen parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from tests.bench.ways import WAYS
from tests.bench.workers import CONTENTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PARTS: Final = (
    "limit", "memory", "growth", "shared", "embedding", "inference", "many", "uncached", "contents",
    "storm",
)  # fmt: skip
QUICK: Final = {
    "PARTS": "limit,memory,embedding",
    "SIZES": "0.25,1",
    "WAYS": "cold,stock,quickthaw",
    "RUNS": "3",
    "STEADY": "1",
}
FULL: Final = {
    "PARTS": ",".join(PARTS),
    "SIZES": "4,0.25,8,1",
    "CONTENTS": "half-zero,model",
    "WAYS": ",".join(WAYS),
    "RUNS": "5",
    "STEADY": "10",
    "MANY": "1,4,8",
    "STORM": "600",
}


class WrongPlan(Exception):
    """A variable has a value that means nothing. The message names both."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a run. sizes: GiB, in the order of the run. contents: of that part.

    steady_s: how long a replica is asked. many: numbers of replicas at once. storm_s: seconds of
    the event stress test.
    """

    parts: Sequence[str]
    sizes: Sequence[float]
    contents: Sequence[str]
    ways: Sequence[str]
    runs: int
    steady_s: float
    many: Sequence[int]
    storm_s: int

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Self:
        """Returns the plan of an environment. QUICK=1 chooses other defaults. Raises WrongPlan."""
        given = {name: value for name, value in environment.items() if name in FULL and value}
        chosen = {**FULL, **(QUICK if environment.get("QUICK") else {}), **given}
        lists = {name: [part for part in chosen[name].split(",") if part] for name in chosen}
        _known("PARTS", lists["PARTS"], PARTS)
        _known("CONTENTS", lists["CONTENTS"], CONTENTS)
        _known("WAYS", lists["WAYS"], WAYS)
        try:
            return cls(
                lists["PARTS"], [float(size) for size in lists["SIZES"]], lists["CONTENTS"],
                lists["WAYS"], int(chosen["RUNS"]), float(chosen["STEADY"]),
                [int(count) for count in lists["MANY"]], int(chosen["STORM"]),
            )  # fmt: skip
        except ValueError as error:
            raise WrongPlan(f"a number was expected: {error}") from error


def _known(name: str, values: Sequence[str], known: Sequence[str]) -> None:
    if wrong := [value for value in values if value not in known]:
        raise WrongPlan(f"{name}={','.join(wrong)}: known are {', '.join(known)}")
