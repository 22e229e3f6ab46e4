"""Holds the result of a check of the gate, and formats it. Lean."""

from __future__ import annotations

from shim.contract import jsontext
from shim.contract.jsontext import canonical

UNKNOWN = "unknown"
_MOST_CHARS = 300
"""Length of a value in a text for people. Programs get the whole value."""


class Finding:
    """The result of a check for a snapshot and a container.

    code: of the check, stable. rule: the number of the check's rule. captured, wanted: the two
    values, None for an unknown value. fits: False makes the finding a refusal.
    """

    __slots__ = ("captured", "code", "fits", "rule", "wanted")

    def __init__(
        self, code: str, rule: int, captured: str | None, wanted: str | None, fits: bool
    ) -> None:
        self.code, self.rule, self.fits = code, rule, fits
        self.captured, self.wanted = captured, wanted

    def differences(self) -> tuple[str, str]:
        """Returns both values as text; of lists and objects only the items that differ."""
        if self.captured is None or self.wanted is None:
            return self.captured or UNKNOWN, self.wanted or UNKNOWN
        if self.fits:
            return self.captured, self.wanted
        return _without_common(self.captured, self.wanted)

    def __str__(self) -> str:
        """Returns the text for the pod's author."""
        captured, wanted = map(_cut, self.differences())
        return f"{self.code}: the snapshot has {captured}, the pod asks for {wanted}"

    def __repr__(self) -> str:
        return f"Finding({self.code!r}, {self.captured!r}, {self.wanted!r}, {self.fits})"

    def as_json(self) -> dict[str, object]:
        """Returns the finding for programs, with whole values; null is for an unknown value."""
        return {
            "code": self.code, "rule": self.rule, "fits": self.fits, "captured": self.captured,
            "wanted": self.wanted, "differences": list(self.differences()),
            "text": "" if self.fits else str(self),
        }  # fmt: skip


def _without_common(captured: str, wanted: str) -> tuple[str, str]:
    try:
        have, want = _differences(jsontext.parse(captured), jsontext.parse(wanted))
        return canonical(have), canonical(want)
    except (ValueError, RecursionError):
        return captured, wanted  # not JSON, or odd JSON: a version, a name


def _cut(text: str) -> str:
    """Returns a short text: a pod's author chose the length of this text."""
    if len(text) <= _MOST_CHARS:
        return text
    return f"{text[:_MOST_CHARS]}… ({len(text)} characters)"


def _only_in(these: list[object], others: list[object]) -> list[object]:
    """Returns the items of `these` alone, in one pass over each list: both may be long."""
    known = {canonical(item) for item in others}
    return [item for item in these if canonical(item) not in known]


def _differences(have: object, want: object) -> tuple[object, object]:
    if isinstance(have, list) and isinstance(want, list):
        left, right = _only_in(have, want), _only_in(want, have)
        # Lists with equal items differ in their order, and then the whole lists are the difference.
        return (left, right) if left or right else (have, want)
    if isinstance(have, dict) and isinstance(want, dict):
        pairs = {
            name: _differences(have.get(name), want.get(name))
            for name in have.keys() | want.keys()
            if have.get(name) != want.get(name)
        }
        return (
            {name: pair[0] for name, pair in pairs.items() if name in have},
            {name: pair[1] for name, pair in pairs.items() if name in want},
        )
    return have, want
