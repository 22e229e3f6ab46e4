"""Draws bars as inline SVG: in groups, a bar for each way, with the spread as a whisker."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WIDTH: Final = 720
LABEL_WIDTH: Final = 118
VALUE_WIDTH: Final = 96
BAR: Final = 16
STEP: Final = 20
GROUP_GAP: Final = 26


@dataclass(frozen=True, slots=True)
class Bar:
    """A median with the least and the greatest value."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Group:
    """Bars that are compared with each other, by the way's name."""

    label: str
    bars: Mapping[str, Bar]


def number(value: float) -> str:
    """Returns a number with three significant figures."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def chart(title: str, unit: str, groups: Sequence[Group], note: str = "") -> str:
    """Returns a figure, empty when there is nothing to show. The scale begins at 0."""
    groups = [group for group in groups if group.bars]
    if not groups:
        return ""
    most = max(bar.high for group in groups for bar in group.bars.values()) or 1.0
    scale = (WIDTH - LABEL_WIDTH - VALUE_WIDTH) / most
    drawn, y = [], 0
    for group in groups:
        drawn.append(f'<text class="group" x="0" y="{y + 15}">{escape(group.label)}</text>')
        y += GROUP_GAP - 2
        for way, bar in group.bars.items():
            drawn.append(_bar(way, bar, unit, y, scale))
            y += STEP
        y += 10
    words = f"{title}, in {unit}" if unit else title
    return (
        f'<figure><figcaption><b>{escape(words)}</b> <span class="note">{escape(note)}</span>'
        f'</figcaption><svg viewBox="0 0 {WIDTH} {y}" role="img" aria-label="{escape(title)}">'
        f"{''.join(drawn)}</svg></figure>"
    )


def _bar(way: str, bar: Bar, unit: str, y: int, scale: float) -> str:
    x, length = LABEL_WIDTH, max(bar.value * scale, 1.5)
    middle = y + BAR / 2
    low, high = x + bar.low * scale, x + bar.high * scale
    told = f"{way}: {number(bar.value)} {unit} ({number(bar.low)} to {number(bar.high)})"
    return (
        f'<g><title>{escape(told)}</title><text class="way" x="{x - 8}" y="{middle + 4}" '
        f'text-anchor="end">{escape(way)}</text>'
        f'<rect class="way-{escape(way)}" x="{x}" y="{y}" width="{length:.1f}" height="{BAR}" '
        f'rx="3"/><path class="whisker" d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {y + 4}'
        f'V{y + BAR - 4}M{high:.1f} {y + 4}V{y + BAR - 4}"/>'
        f'<text class="value" x="{max(x + length, high) + 6:.1f}" y="{middle + 4}">'
        f"{number(bar.value)}</text></g>"
    )
