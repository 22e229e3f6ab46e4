"""Compares figures with the bench's targets, an entry for each: {"goal", "value", "spread", "met"}.

A value is an object of figures, each with a limit; `spread` has their [least, greatest] over the
runs. Ratios are ratios of medians, their spread is the spread of the pairs. Only figures of the
same run are compared. `met` is null when a figure was not measured, or not in the same run.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tests.bench.workers import BACKINGS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.bench.result import Results

AT_LEAST, AT_MOST = ">=", "<="
LARGE: Final = "memory-4-random"
SMALLEST_GIB, LARGEST_GIB = 0.25, 8.0


@dataclass(frozen=True, slots=True)
class Figure:
    """A number of a goal. values: of the pairs or runs. None and () when not measured.

    compare: the required relation to `limit`; "" for a figure that only explains.
    """

    name: str
    value: float | None
    values: Sequence[float] = ()
    compare: str = ""
    limit: float = 0.0

    @property
    def met(self) -> bool | None:
        """Whether the figure meets its limit; None when it was not measured."""
        if self.value is None:
            return None
        if self.compare == AT_LEAST:
            return self.value >= self.limit
        return self.value <= self.limit if self.compare == AT_MOST else True


def targets(results: Results) -> list[dict[str, Any]]:
    """Returns the targets section of bench.json."""
    return [_entry(goal, of(results)) for goal, of in _GOALS.items()]


def _entry(goal: str, figures: Sequence[Figure]) -> dict[str, Any]:
    judged = [figure.met for figure in figures if figure.compare]
    met = None if None in judged or not judged else all(judged)
    return {
        "goal": goal,
        "value": {each.name: _rounded(each.value) for each in figures},
        "spread": {
            each.name: [_rounded(min(each.values)), _rounded(max(each.values))]
            for each in figures
            if each.values
        },
        "met": met,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def median(values: Sequence[float]) -> float | None:
    """Returns the median, None without values."""
    return statistics.median(values) if values else None


def ratio(
    name: str, upper: Sequence[float], lower: Sequence[float], compare: str = "", limit: float = 0
) -> Figure:
    """Returns a ratio of two medians, with the spread of the pairs."""
    if not upper or not lower or not statistics.median(lower):
        return Figure(name, None, (), compare, limit)
    pairs = [one / other for one, other in zip(upper, lower, strict=False) if other]
    value = statistics.median(upper) / statistics.median(lower)
    return Figure(name, value, pairs, compare, limit)


def slope(name: str, low: Sequence[float], high: Sequence[float], limit: float) -> Figure:
    """Returns the milliseconds per GiB from the smallest to the largest worker."""
    if not low or not high:
        return Figure(name, None, (), AT_MOST, limit)
    gib = LARGEST_GIB - SMALLEST_GIB
    pairs = [(b - a) * 1000 / gib for a, b in zip(low, high, strict=False)]
    value = (statistics.median(high) - statistics.median(low)) * 1000 / gib
    return Figure(name, value, pairs, AT_MOST, limit)


def _first_answer(results: Results) -> list[Figure]:
    def first(worker: str, way: str) -> Sequence[float]:
        return results.of("memory", worker, way, "first_answer_s")

    ours = first(LARGE, "quickthaw")
    small, large = (f"memory-{gib:g}-random" for gib in (SMALLEST_GIB, LARGEST_GIB))
    low, high = (
        results.of("growth", worker, "quickthaw", "first_answer_s") for worker in (small, large)
    )
    return [
        Figure("first_answer_s", median(ours), ours, AT_MOST, 0.3),
        ratio("times_as_fast_as_stock", first(LARGE, "stock"), ours, AT_LEAST, 8),
        slope("ms_per_gib", _with(results, ("growth", large), low, ("growth", small)), high, 5),
    ]


def _with(
    results: Results, one: tuple[str, str], values: Sequence[float], other: tuple[str, str]
) -> Sequence[float]:
    """Returns `values`, of `other`, only if `one` was measured in the same run."""
    return values if results.run_of(*one) == results.run_of(*other) else ()


def _rates(results: Results, part: str, worker: str, way: str) -> list[float]:
    """Returns bytes per second from the call until all memory is there."""
    filled = results.of(part, worker, way, "resident_bytes")
    took = results.of(part, worker, way, "resident_s")
    return [size / seconds for size, seconds in zip(filled, took, strict=False)]


def _resident(results: Results) -> list[Figure]:
    ours, stock = (_rates(results, "memory", LARGE, way) for way in ("quickthaw", "stock"))
    fill = results.of("memory", LARGE, "quickthaw", "fill_bytes_per_s")
    limit = results.of("memory", LARGE, "limit", "fill_2_bytes_per_s")
    return [
        ratio("times_the_rate_of_stock", ours, stock, AT_LEAST, 2),
        ratio("of_the_limit", fill, limit, AT_LEAST, 0.8),
        ratio("of_the_limit_with_the_start", ours, limit),
    ]


def _shared(results: Results) -> list[Figure]:
    found = []
    for kind in BACKINGS:
        worker = f"shared-2-{kind}"
        ours, stock = (_rates(results, "shared", worker, way) for way in ("quickthaw", "stock"))
        found.append(ratio(f"{kind}_times_the_rate_of_stock", ours, stock, AT_LEAST, 2))
    return found


def _frozen(results: Results) -> list[Figure]:
    def of(worker: str) -> tuple[Sequence[float], Sequence[float]]:
        ours, stock = (
            results.of("capture", worker, way, "frozen_s") for way in ("quickthaw", "stock")
        )
        return ours, stock

    ours, stock = of(LARGE)
    found = [ratio("of_stock", ours, stock, AT_MOST, 0.5), Figure("frozen_s", median(ours), ours)]
    for kind in BACKINGS:
        its, stocks = of(f"shared-2-{kind}")
        if its and stocks:
            found.append(ratio(f"{kind}_of_stock", its, stocks, AT_MOST, 0.5))
    return found


def _embedding(results: Results) -> list[Figure]:
    cold, ours = (
        results.of("embedding", "embedding", way, "first_answer_s") for way in ("cold", "quickthaw")
    )
    same = results.of("embedding", "embedding", "quickthaw", "same_answer")
    return [
        ratio("times_as_fast_as_cold", cold, ours, AT_LEAST, 20),
        Figure("same_to_the_last_bit", min(same) if same else None, same, AT_LEAST, 1),
    ]


def _latency(results: Results) -> list[Figure]:
    found = []
    for part, worker in (
        ("memory", LARGE), ("embedding", "embedding"), ("inference", "inference"),
    ):  # fmt: skip
        ours = results.of(part, worker, "quickthaw", "first_second_p99_s")
        warm = results.of("capture", worker, "warm", "first_second_p99_s")
        warm = _with(results, (part, worker), warm, ("capture", worker))
        found.append(ratio(f"{worker}_times_warm", ours, warm, AT_MOST, 3))
    return found


def _storm(results: Results) -> list[Figure]:
    def of(metric: str) -> Sequence[float]:
        return results.of("storm", "storm", "quickthaw", metric)

    return [
        Figure("seconds", median(of("seconds")), of("seconds"), AT_LEAST, 600),
        Figure("wrong", median(of("wrong")), of("wrong"), AT_MOST, 0),
        Figure("hangs", median(of("hangs")), of("hangs"), AT_MOST, 0),
    ]


_GOALS: Final[dict[str, Callable[[Results], list[Figure]]]] = {
    "first answer of the 4 GiB worker: <= 0.3 s, at least 8x faster than stock runc restore, "
    "and growing <= 5 ms per GiB from 0.25 to 8 GiB": _first_answer,
    "all memory resident: >= 2x stock runc restore's rate, >= 80 % of the measured limit":
        _resident,
    "shared memory and memfd of 2 GiB: >= 2x stock": _shared,
    "capture frozen time: <= 0.5x stock `runc checkpoint`": _frozen,
    "PyTorch embedding server: first answer >= 20x faster than its cold start, same embedding to "
    "the last bit": _embedding,
    "request latency p99 in the first second after restore: <= 3x that of the warm source":
        _latency,
    "the event stress test: 10 minutes, zero wrong bytes, zero hangs": _storm,
}  # fmt: skip
