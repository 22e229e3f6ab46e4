"""The bench computes correctly: targets, spreads, percentiles, the time at which memory is
there.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.asking import Asked, Asking, Request, percentile
from tests.bench.chart import Bar, Group, chart
from tests.bench.page import of as page_of
from tests.bench.plan import PARTS, Plan, WrongPlan
from tests.bench.resident import Level, filled
from tests.bench.result import Results
from tests.bench.targets import LARGE, targets
from tests.bench.turns import turns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.node.enclosure import Enclosure

FIGURES = st.floats(0.001, 1000)


def of_large(**values: list[float]) -> Results:
    """Values of the 4 GiB worker, by WAY_METRIC."""
    results = Results()
    for name, known in values.items():
        way, _, metric = name.partition("_")
        for value in known:
            results.add("memory", LARGE, way, **{metric: value})
    return results


def entry(results: Results, begins: str) -> dict[str, Any]:
    return next(each for each in targets(results) if each["goal"].startswith(begins))


def test_each_target_has_an_entry_and_is_not_met_without_figures() -> None:
    every = targets(Results())
    assert len(every) == 7
    assert all(each.keys() == {"goal", "value", "spread", "met"} for each in every)
    assert all(each["met"] is None for each in every)


def test_first_answer_target_needs_all_three_figures() -> None:
    results = of_large(
        quickthaw_first_answer_s=[0.2, 0.25, 0.21], stock_first_answer_s=[2.0, 2.4, 2.1]
    )
    assert entry(results, "first answer")["met"] is None, "growth was not measured"
    results.add("growth", "memory-0.25-random", "quickthaw", first_answer_s=0.2)
    results.add("growth", "memory-8-random", "quickthaw", first_answer_s=0.2 + 7.75 * 0.004)
    found = entry(results, "first answer")
    assert found["value"] == {
        "first_answer_s": 0.21, "times_as_fast_as_stock": 10.0, "ms_per_gib": 4.0,
    }  # fmt: skip
    assert found["spread"]["times_as_fast_as_stock"] == [9.6, 10.0]
    assert found["met"] is True


def test_figures_of_two_runs_are_not_compared() -> None:
    older, newer = Results(run="monday"), Results(run="tuesday")
    older.add("growth", "memory-0.25-random", "quickthaw", first_answer_s=0.1)
    older.add("memory", LARGE, "quickthaw", first_answer_s=0.9)
    newer.add("growth", "memory-8-random", "quickthaw", first_answer_s=0.2)
    newer.add("memory", LARGE, "quickthaw", first_answer_s=0.15)
    known = newer.over(Results.from_json(older.as_json()))
    found = entry(Results.from_json(known.as_json()), "first answer")["value"]
    assert (found["first_answer_s"], found["ms_per_gib"]) == (0.15, None)
    older.add("growth", "memory-8-random", "quickthaw", first_answer_s=0.2)
    found = entry(Results.from_json(older.as_json()), "first answer")["value"]
    assert found["ms_per_gib"] is not None


def test_single_figure_beyond_its_limit_misses_the_goal() -> None:
    results = of_large(
        quickthaw_resident_bytes=[8e9], quickthaw_resident_s=[1.0],
        quickthaw_fill_bytes_per_s=[9e9], stock_resident_bytes=[8e9], stock_resident_s=[3.0],
    )  # fmt: skip
    results.add("memory", LARGE, "limit", fill_2_bytes_per_s=12e9)
    found = entry(results, "all memory resident")
    assert found["value"]["times_the_rate_of_stock"] == 3.0
    assert found["value"]["of_the_limit"] == 0.75
    assert found["met"] is False


def test_storm_with_a_single_wrong_byte_misses_the_goal() -> None:
    results = Results()
    results.add("storm", "storm", "quickthaw", seconds=600, wrong=1, hangs=0)
    assert entry(results, "the event stress test")["met"] is False


def test_frozen_time_is_compared_with_the_frozen_time_of_runc() -> None:
    results = Results()
    results.add("capture", LARGE, "quickthaw", frozen_s=0.3)
    results.add("capture", LARGE, "stock", frozen_s=1.0)
    assert entry(results, "capture frozen")["value"]["of_stock"] == 0.3
    assert entry(results, "capture frozen")["met"] is True
    results.add("capture", "shared-2-memfd", "quickthaw", frozen_s=0.6)
    results.add("capture", "shared-2-memfd", "stock", frozen_s=1.0)
    assert entry(results, "capture frozen")["value"]["memfd_of_stock"] == 0.6
    assert entry(results, "capture frozen")["met"] is False, "nor may shared memory take longer"


@given(st.lists(FIGURES, min_size=1, max_size=7), st.lists(FIGURES, min_size=1, max_size=7))
def test_ratio_of_medians_is_within_the_ratio_of_extremes(
    ours: list[float], stock: list[float]
) -> None:
    results = of_large(quickthaw_first_answer_s=ours, stock_first_answer_s=stock)
    value = entry(results, "first answer")["value"]["times_as_fast_as_stock"]
    assert min(stock) / max(ours) * 0.99 <= value <= max(stock) / min(ours) * 1.01


def test_results_survive_json_and_a_later_part_replaces_only_its_own_results() -> None:
    older, newer = Results(), Results()
    older.add("memory", "a", "cold", first_answer_s=1.0)
    older.add("memory", "b", "cold", first_answer_s=2.0)
    newer.add("memory", "a", "stock", first_answer_s=3.0)
    known = newer.over(Results.from_json(older.as_json()))
    assert known.of("memory", "b", "cold", "first_answer_s") == [2.0]
    assert known.of("memory", "a", "stock", "first_answer_s") == [3.0]
    assert known.of("memory", "a", "cold", "first_answer_s") == (), "not interleaved with the new"
    row = known.as_json()[0]
    assert {"part", "worker", "way", "metric", "run", "raw", "median", "spread"} == row.keys()


@given(st.lists(FIGURES, min_size=1), st.integers(1, 100))
def test_percentile_is_a_value_that_enough_others_do_not_exceed(
    values: list[float], rank: int
) -> None:
    found = percentile(values, rank)
    assert found in values
    assert sum(value <= found for value in values) >= rank / 100 * len(values)


def test_latencies_of_the_first_second_are_apart() -> None:
    latencies = [(n / 100, 0.5 if n == 90 else 0.001) for n in range(1, 301)]
    asked = Asked(0.0, "{}", latencies, 0)
    found = asked.percentiles()
    assert found["first_second_p50_s"] == found["p50_s"] == 0.001
    assert found["p99_s"] == 0.001
    assert [second["first_second_p99_s"] for second in asked.by_second()] == [0.001] * 3
    assert percentile([took for _, took in latencies[:90]], 99) == 0.5


class ToldAtOnce:
    """A node whose client has its answer before anybody reads that the client is up."""

    said = 'up\\n{"first_at_s": 1.5, "first_body": "", "latencies": [], "errors": 0}\\n'

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        del argv
        return subprocess.Popen([sys.executable, "-c", f"print('{self.said}')"], **options)


def test_answer_that_comes_together_with_the_client_start_is_not_lost() -> None:
    with Asking(cast("Enclosure", ToldAtOnce()), "127.0.0.1", Request("/", 1.0), 0) as asking:
        assert asking.found().first_at_s == 1.5


def test_memory_counts_as_filled_at_nearly_its_last_level() -> None:
    levels = [Level(10 + n / 10, min(n, 10) * 100) for n in range(1, 30)]
    found = filled(levels, 9.0)
    assert found.bytes == 1000
    assert found.resident_s == pytest.approx(2.0)
    assert found.bytes_per_s == pytest.approx(1000)


def test_no_sample_is_an_error() -> None:
    with pytest.raises(ValueError, match="no process"):
        filled([], 0.0)


def test_variables_choose_parts_and_an_unknown_part_is_reported() -> None:
    assert Plan.of({}).parts == list(PARTS)
    quick = Plan.of({"QUICK": "1"})
    assert (list(quick.sizes), quick.runs) == ([0.25, 1.0], 3)
    assert "storm" not in quick.parts, "it has less than five minutes"
    chosen = Plan.of({"QUICK": "1", "SIZES": "0.25", "RUNS": ""})
    assert (list(chosen.sizes), chosen.runs) == ([0.25], quick.runs), "an empty one is none"
    assert Plan.of({}).runs >= 5, "a median of fewer says little"
    with pytest.raises(WrongPlan, match="PARTS=nothing"):
        Plan.of({"PARTS": "nothing"})
    with pytest.raises(WrongPlan, match="number"):
        Plan.of({"SIZES": "big"})


def test_page_stands_alone_and_escapes_its_input() -> None:
    results = of_large(quickthaw_first_answer_s=[0.2], stock_first_answer_s=[2.0])
    page = page_of(
        {
            "made": "<now>", "machine": {"kernel": "<6.18>"}, "targets": targets(results),
            "series": results.as_json(),
        }
    )  # fmt: skip
    assert "<now>" not in page
    assert "<6.18>" not in page
    assert "memory, 4 GiB, random" in page
    assert not any(word in page for word in ("http", "src=", "@import", "url("))


def test_chart_without_figures_is_empty() -> None:
    assert chart("title", "s", [Group("none", {})]) == ""
    assert "<rect" in chart("title", "s", [Group("one", {"cold": Bar(0.0, 0.0, 0.0)})])


@pytest.mark.parametrize("names", ["qs", "csq", "cspq"])
def test_each_way_follows_each_other_way_equally_often(names: str) -> None:
    followed = Counter(
        pair
        for number in range(2 * len(names))
        for pair in itertools.pairwise(turns(names, number))
    )
    assert followed == dict.fromkeys(itertools.permutations(names, 2), 2)
    assert all(sorted(turns(names, number)) == sorted(names) for number in range(9))
