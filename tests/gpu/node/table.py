"""Figures of runs: medians with their spread, and the waterfall of a capture or a restore. Pure."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, Final

from shim.kernel.steps import BEGIN

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    Bar = tuple[str, float, float]
WIDTH: Final = 40


def bars(steps: Mapping[str, float]) -> list[Bar]:
    """Returns (name, begin, end) of each step with a begin, by begin; those that contain others
    first.
    """
    found = [
        (name, steps[name + BEGIN], steps[name + BEGIN] + seconds)
        for name, seconds in steps.items()
        if not name.endswith(BEGIN) and name + BEGIN in steps
    ]
    return sorted(found, key=lambda bar: (bar[1], -bar[2]))


def median_steps(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the median of each key over the runs that have it."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {
        name: round(statistics.median(run[name] for run in runs if name in run), 4)
        for name in names
    }


def waterfall(steps: Mapping[str, float]) -> str:
    """Returns a Markdown table with a bar for each step."""
    found = bars(steps)
    end = max((stop for _, _, stop in found), default=0.0) or 1.0
    lines = ["| step | from s | to s | s | |", "|---|---|---|---|---|"]
    for name, start, stop in found:
        left = round(start / end * WIDTH)
        drawn = "·" * left + "█" * max(1, round((stop - start) / end * WIDTH))
        lines.append(f"| {name} | {start:.3f} | {stop:.3f} | {stop - start:.3f} | `{drawn}` |")
    return "\n".join(lines)


def spread(values: Iterable[float]) -> dict[str, float]:
    """Returns count, median, least and greatest."""
    listed = sorted(values)
    if not listed:
        return {"count": 0}
    return {
        "count": len(listed), "median": round(statistics.median(listed), 4),
        "least": round(listed[0], 4), "greatest": round(listed[-1], 4),
    }  # fmt: skip


def told(values: Mapping[str, float]) -> str:
    """Returns `median (least to greatest)`, of `spread`."""
    if not values.get("count"):
        return "-"
    return f"{values['median']:.3f} ({values['least']:.3f} to {values['greatest']:.3f})"


LIMITS: Final[tuple[tuple[str, tuple[str, ...], float], ...]] = (
    ("first right answer, 30 GiB, direct", ("direct", "first_answer_s"), 0.8),
    ("source stopped, 30 GiB, direct", ("direct", "stopped_s"), 2.0),
    ("first right answer, 30 GiB, driver", ("driver", "first_answer_s"), 6.5),
    ("source stopped, 30 GiB, driver", ("driver", "stopped_s"), 12.0),
    ("first right answer, captured and restored twice", ("direct", "again_first_answer_s"), 0.8),
)
"""Name, place in the document, limit in seconds."""


def summary(document: Mapping[str, Any]) -> str:
    """Returns the tables of a run, in Markdown."""
    lines = ["| what | median (least to greatest) s | limit s | share of the limit |",
             "|---|---|---|---|"]  # fmt: skip
    for name, place, limit in LIMITS:
        found: Any = document
        for each in place:
            found = found.get(each, {}) if isinstance(found, dict) else {}
        if found.get("count"):
            share = f"{found['median'] / limit:.0%}"
            lines.append(f"| {name} | {told(found)} | {limit} | {share} |")
    cold = document.get("cold", {}).get("first_answer_s", {})
    direct = document.get("direct", {}).get("first_answer_s", {})
    if cold.get("count"):
        lines.append(f"| cold start from page cache | {told(cold)} | | |")
        if direct.get("count"):
            lines.append(f"| cold / direct | {cold['median'] / direct['median']:.1f} | >= 12 | |")
    for way in ("direct", "driver"):
        for what in ("capture", "restore"):
            if steps := document.get(way, {}).get(f"{what}_steps"):
                lines += ["", f"{way}, {what}:", "", waterfall(steps)]
    if rows := document.get("faults"):
        lines += ["", "| fault | outcome | right | s |", "|---|---|---|---|"]
        lines += [f"| {r['row']} | {r['outcome']} | {r['ok']} | {r['seconds']} |" for r in rows]
    return "\n".join(lines) + "\n"
