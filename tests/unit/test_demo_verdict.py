"""The demo fails when its claims are false."""

import dataclasses
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.demo.__main__ import verdict
from tests.demo.figures import Spread
from tests.demo.overhead import Overhead
from tests.demo.story import Found, Run


def run(kind: str, seconds: float, **fields: object) -> Run:
    well = Run(f"{kind}-1", kind, seconds, seconds / 2, True, kind == "restore", (), {})
    return dataclasses.replace(well, **fields)  # type: ignore[arg-type]  # names are Run's


def found(*runs: Run, added_ms: float = 1.0, source_serves: bool = True) -> Found:
    overhead = Overhead("state", Spread.of([9 + added_ms]), Spread.of([9]), Spread.of([added_ms]))
    return Found(list(runs), [overhead], source_serves, 0.3)


COLD, RESTORE = run("cold", 5.0), run("restore", 0.5)


def status(shown: Found) -> int:
    return verdict(shown, Console(file=io.StringIO()))


def test_equal_fast_and_cheap_restores_pass() -> None:
    assert status(found(run("first", 6.0), COLD, RESTORE)) == 0


@pytest.mark.parametrize(
    "shown",
    [
        found(COLD, run("restore", 1.1)),
        found(COLD, RESTORE, added_ms=3.1),
        found(COLD, RESTORE, source_serves=False),
        found(COLD, run("restore", 0.5, answers_equal=False)),
        found(COLD, run("restore", 0.5, init_is_restored=False)),
        found(run("cold", 5.0, init_is_restored=True), RESTORE),
        found(COLD, run("restore", 0.5, differences=["its hostname is another pod's"])),
    ],
    ids=["slow", "costly", "source", "answers", "cold init", "restored control", "difference"],
)
def test_each_false_claim_is_a_failure(shown: Found) -> None:
    assert status(shown) == 1


@given(st.lists(st.floats(0, 100), min_size=1))
def test_values_of_a_spread_are_in_ascending_order(values: list[float]) -> None:
    spread = Spread.of(values)
    assert spread.min <= spread.q1 <= spread.median <= spread.q3 <= spread.max
    assert spread.count == len(values)
