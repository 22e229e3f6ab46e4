"""The tables of the measurement of GPU containers."""

import time

from hypothesis import given
from hypothesis import strategies as st

from shim.kernel.steps import Steps, durations
from tests.gpu.node.table import bars, median_steps, spread, summary, waterfall

NAMES = st.sampled_from(["criu", "gpu", "frozen", "gpu_load"])
SECONDS = st.floats(0, 100)


@given(st.dictionaries(NAMES, st.tuples(SECONDS, SECONDS)))
def test_each_step_with_a_begin_has_a_bar(found: dict[str, tuple[float, float]]) -> None:
    steps = Steps(since=0.0)
    for name, (began, took) in found.items():
        steps.add(name, began, began + took)
    assert [name for name, _, _ in sorted(bars(steps))] == sorted(found)
    assert waterfall(steps).count("\n") == len(found) + 1
    assert durations(steps).keys() == found.keys()


def test_steps_that_run_side_by_side_are_told_with_their_begins() -> None:
    steps = Steps()
    with steps.timed("outer"):
        time.sleep(0.01)
        with steps.timed("inner"):
            time.sleep(0.01)
    (outer, began, ended), (inner, from_s, to_s) = bars(steps)
    assert (outer, inner) == ("outer", "inner")
    assert began <= from_s <= to_s <= ended + 0.001


def test_medians_and_shares_of_the_limits() -> None:
    assert median_steps([{"a": 1.0}, {"a": 3.0, "b": 2.0}]) == {"a": 2.0, "b": 2.0}
    assert spread([]) == {"count": 0}
    found = {
        "direct": {"first_answer_s": spread([0.6, 0.5, 0.7]), "restore_steps": {}},
        "cold": {"first_answer_s": spread([12.0])},
        "faults": [{"row": "loader killed", "outcome": "cold", "ok": True, "seconds": 3.0}],
    }
    told = summary(found)
    assert "0.600 (0.500 to 0.700) | 0.8 | 75%" in told
    assert "| cold / direct | 20.0 |" in told
    assert "| loader killed | cold | True | 3.0 |" in told
