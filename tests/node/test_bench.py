"""The bench measures: a small worker, two rounds, without podman."""

from tests.bench.parts import Bench
from tests.bench.plan import Plan
from tests.bench.result import Results
from tests.bench.ways import COLD, QUICK, STOCK

WORKER = "memory-0.0625-random"
VARIABLES = {
    "PARTS": "memory", "SIZES": "0.0625", "RUNS": "2", "STEADY": "1",
    "WAYS": f"{COLD},{STOCK},{QUICK}",
}  # fmt: skip


def test_bench_measures_every_way_in_every_round() -> None:
    results = Results()
    bench = Bench(Plan.of(VARIABLES), results, print, lambda: None)
    bench.run()
    assert bench.failed == []
    for way in (COLD, STOCK, QUICK):
        for metric in ("first_answer_s", "resident_s"):
            values = results.of("memory", WORKER, way, metric)
            assert len(values) == 2, (way, metric, values)
            assert min(values) > 0
        filled = results.of("memory", WORKER, way, "resident_bytes")
        assert min(filled) > 0.0625 * 2**30, (way, filled)
    for way in (STOCK, QUICK):
        assert len(results.of("capture", WORKER, way, "frozen_s")) == 2
        assert min(results.of("capture", WORKER, way, "stored_bytes")) > 0.0625 * 2**30
