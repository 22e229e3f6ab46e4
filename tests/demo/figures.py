"""Computes the figures of the demo: medians with their spread, and the limits for them."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

SPEEDUP_AT_LEAST: Final = 5.0
OVERHEAD_AT_MOST_MS: Final = 3.0


@dataclass(frozen=True, slots=True)
class Spread:
    """Several measurements of the same quantity. q1, q3: the quartiles."""

    median: float
    min: float
    max: float
    q1: float
    q3: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """Returns the spread of values. Raises statistics.StatisticsError when there are none."""
        known = sorted(values)
        median = statistics.median(known)
        # Python 3.11 and 3.12 compute no quartiles of a single value.
        q1, _, q3 = statistics.quantiles(known if len(known) > 1 else known * 2, method="inclusive")
        median, low, high, q1, q3 = (
            round(value, 4) for value in (median, known[0], known[-1], q1, q3)
        )
        return cls(median, low, high, q1, q3, len(known))
