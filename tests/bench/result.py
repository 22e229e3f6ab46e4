"""Keeps raw values by part, worker, way and metric, as build/bench.json has them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from tests.demo.figures import Spread

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Key(NamedTuple):
    """Identifies a series of values. part: its workers and ways ran together, interleaved."""

    part: str
    worker: str
    way: str
    metric: str


@dataclass
class Results:
    """All values of a run, in the order in which they were taken.

    run: the name of the run. runs: for workers of a part that come from an earlier run, its name.
    """

    values: dict[Key, list[float]] = field(default_factory=dict)
    run: str = ""
    runs: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, part: str, worker: str, way: str, **metrics: float) -> None:
        """Add a value for each metric. Seconds end in `_s`, bytes in `_bytes`."""
        for metric, value in metrics.items():
            self.values.setdefault(Key(part, worker, way, metric), []).append(round(value, 6))

    def of(self, part: str, worker: str, way: str, metric: str) -> Sequence[float]:
        """Returns the values of a key, empty when it was not measured."""
        return self.values.get(Key(part, worker, way, metric), ())

    def median(self, part: str, worker: str, way: str, metric: str) -> float | None:
        """Returns the median of a key, None when it was not measured."""
        values = self.of(part, worker, way, metric)
        return Spread.of(values).median if values else None

    def run_of(self, part: str, worker: str) -> str:
        """Returns the run in which a worker was measured: only figures of one run compare."""
        return self.runs.get((part, worker), self.run)

    def parts(self) -> list[str]:
        """Returns the parts in the order in which they ran."""
        return list(dict.fromkeys(key.part for key in self.values))

    def workers(self, part: str) -> list[str]:
        """Returns the workers of a part."""
        return list(dict.fromkeys(key.worker for key in self.values if key.part == part))

    def ways(self, part: str, worker: str) -> list[str]:
        """Returns the ways of a worker in a part."""
        of_worker = (key for key in self.values if (key.part, key.worker) == (part, worker))
        return list(dict.fromkeys(key.way for key in of_worker))

    def as_json(self) -> list[dict[str, Any]]:
        """Returns an object for each key: raw values, median, spread."""
        return [
            {
                **key._asdict(),
                "run": self.run_of(key.part, key.worker),
                "raw": values,
                **_summary(values),
            }
            for key, values in self.values.items()
        ]

    @classmethod
    def from_json(cls, series: Iterable[dict[str, Any]]) -> Self:
        """Returns the results in the output of `as_json`."""
        found = cls()
        for row in series:
            key = Key(*(row[name] for name in Key._fields))
            found.values[key] = row["raw"]
            found.runs[key.part, key.worker] = row.get("run", "")
        return found

    def over(self, older: Results) -> Results:
        """Returns these results, and the parts of `older` that these lack.

        A worker of a part is taken whole from a single run: its ways were interleaved.
        """
        mine = {(key.part, key.worker) for key in self.values}
        kept = {
            key: values
            for key, values in older.values.items()
            if (key.part, key.worker) not in mine
        }
        runs = {key[:2]: older.run_of(*key[:2]) for key in kept}
        return Results({**kept, **self.values}, self.run, runs)


def _summary(values: Sequence[float]) -> dict[str, Any]:
    spread = asdict(Spread.of(values))
    return {"median": spread.pop("median"), "spread": spread}
