"""Writes build/bench.html: a page that stands alone, for reading at a glance."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.bench.chart import Bar, Group, chart, number
from tests.bench.result import Results

if TYPE_CHECKING:
    from collections.abc import Sequence

WORDS: Final = {True: ("met", "met"), False: ("missed", "missed"), None: ("open", "not measured")}
GIB: Final = 1 << 30
STYLE: Final = (Path(__file__).parent / "style.css").read_text()
WAYS: Final = (
    ("cold", "cold start"),
    ("stock", "runc restore behind the same CRI calls"),
    ("podman", "podman container restore --import"),
    ("quickthaw", "quickthaw"),
)


def of(document: dict[str, Any]) -> str:
    """Returns the page of a bench.json."""
    results = Results.from_json(document["series"])
    machine = ", ".join(f"{name} {value}" for name, value in document["machine"].items())
    cards = "".join(_card(target) for target in document["targets"])
    legend = " · ".join(f'<b style="color:var(--{way})">■</b> {told}' for way, told in WAYS)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>quickthaw: benchmark</title><style>{STYLE}</style>
<main><h1>quickthaw: benchmark</h1>
<p>{escape(document["made"])} · {escape(machine)}</p>
<p>Bars are medians of interleaved runs, whiskers go from the least to the greatest value.</p>
<h2>What it must show</h2><div class="cards">{cards}</div>
<h2>What was measured</h2><p>{legend}</p><div class="charts">{"".join(_charts(results))}</div>
</main></html>
"""


def _card(target: dict[str, Any]) -> str:
    kind, word = WORDS[target["met"]]
    rows = "".join(
        f"<tr><td>{escape(name.replace('_', ' '))}</td><td>{_told(value)}</td>"
        f"<td>{_range(target['spread'].get(name))}</td></tr>"
        for name, value in target["value"].items()
    )
    return (
        f'<div class="card {kind}"><b class="mark">{word}</b> {escape(target["goal"])}'
        f"<table>{rows}</table></div>"
    )


def _told(value: float | None) -> str:
    return "-" if value is None else number(value)


def _range(spread: Sequence[float] | None) -> str:
    return f"{number(spread[0])} to {number(spread[1])}" if spread else ""


def _charts(results: Results) -> list[str]:
    return [
        *_starts(results),
        _latencies(results),
        *_captures(results),
        *_many(results),
        _limits(results),
    ]


def _groups(
    results: Results, part: str, metric: str, *, by: float = 1.0, only: str = ""
) -> list[Group]:
    """Returns a group for each worker of a part, smallest first as far as they have sizes."""
    found = []
    for worker in sorted(results.workers(part), key=_by_size):
        bars = {
            way: _bar(values, by)
            for way in results.ways(part, worker)
            if (values := results.of(part, worker, way, metric))
        }
        if only in worker:
            found.append(Group(_label(worker), bars))
    return found


def _bar(values: Sequence[float], by: float) -> Bar:
    known = sorted(value * by for value in values)
    middle = len(known) // 2
    median = known[middle] if len(known) % 2 else (known[middle - 1] + known[middle]) / 2
    return Bar(median, known[0], known[-1])


def _by_size(worker: str) -> tuple[str, float]:
    kind, *rest = worker.split("-")
    size = next((float(part) for part in rest if part.replace(".", "").isdigit()), 0.0)
    return f"{kind} {worker.rpartition('-')[2]}", size


def _label(worker: str) -> str:
    kind, _, rest = worker.partition("-")
    size, _, what = rest.partition("-")
    return f"{kind}, {size} GiB, {what}" if what else worker


def _starts(results: Results) -> list[str]:
    note = "from StartContainer (podman: from the call)"
    found = []
    for only, told in (("random", "random memory"), ("half-zero", "half zeros"),
                       ("model", "a model's weights")):  # fmt: skip
        found += [
            chart(
                f"First answer, {told}", "s",
                _groups(results, "memory", "first_answer_s", only=only), note,
            ),
            chart(
                f"All memory there, {told}", "s",
                _groups(results, "memory", "resident_s", only=only), note,
            ),
        ]  # fmt: skip
    for part, told in (("embedding", "PyTorch embedding server"),
                       ("inference", "inference server of the demo")):  # fmt: skip
        groups = _groups(results, part, "first_answer_s")
        found.append(chart(f"First answer, {told}", "s", groups, note))
    for part, told in (("growth", "smallest and largest by turns"), ("shared", "shared memory"),
                       ("uncached", "page cache dropped")):  # fmt: skip
        for metric, what in (
            ("first_answer_s", "First answer"),
            ("resident_s", "All memory there"),
        ):
            found.append(chart(f"{what}, {told}", "s", _groups(results, part, metric), note))
    return found


def _latencies(results: Results) -> str:
    groups = []
    for part, worker in (("memory", "memory-4-random"), ("embedding", "embedding"),
                         ("inference", "inference")):  # fmt: skip
        for metric in ("first_second_p50_s", "first_second_p99_s"):
            bars = {
                way: _bar(values, 1000)
                for way in ("warm", "stock", "quickthaw")
                if (values := results.of("capture" if way == "warm" else part, worker, way, metric))
            }
            rank = metric.split("_")[2]
            groups.append(Group(f"{_label(worker)}: {rank}", bars))
    return chart(
        "Latency of a steady client in the first second", "ms", groups,
        "warm: the source, a second at a time",
    )  # fmt: skip


def _captures(results: Results) -> list[str]:
    return [
        chart("Capture: the source stands still", "s", _groups(results, "capture", "frozen_s")),
        chart("Capture: from the call to its end", "s", _groups(results, "capture", "total_s")),
        chart("Stored", "GiB", _groups(results, "capture", "stored_bytes", by=1 / GIB)),
    ]


def _many(results: Results) -> list[str]:
    return [
        chart("Several at once: the last one's answer", "s",
              _groups(results, "many", "last_answer_s")),
        chart("Several at once: memory of all processes in their cgroups", "GiB",
              _groups(results, "many", "pss_bytes", by=1 / GIB)),
    ]  # fmt: skip


def _limits(results: Results) -> str:
    named = (
        ("fresh memory filled, 1 thread", "fill_1_bytes_per_s"),
        ("fresh memory filled, 2 threads", "fill_2_bytes_per_s"),
        ("disk read, 1 thread", "disk_1_bytes_per_s"),
        ("disk read, 2 threads", "disk_2_bytes_per_s"),
    )
    groups = [
        Group(told, {"limit": _bar(values, 1e-9)})
        for told, metric in named
        if (values := results.of("limit", "machine", "limit", metric))
    ]
    beside = {
        way: _bar(values, 1e-9)
        for way, metric in (("limit", "fill_2_bytes_per_s"), ("quickthaw", "fill_bytes_per_s"))
        if (values := results.of("memory", "memory-4-random", way, metric))
    }
    groups.append(Group("4 GiB worker being filled, and fresh memory by turns with it", beside))
    return chart("What this machine can do", "GB/s", groups)
