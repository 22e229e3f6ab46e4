"""What a check of the gate has found, and how it reads. Lean."""

from __future__ import annotations

from shim.contract import jsontext
from shim.contract.jsontext import canonical

UNKNOWN = "unknown"
_MOST_CHARS = 300
"""Of a value in a text for people. Programs get all of it."""


class Finding:
    """One check applied to one snapshot and one container.

    code: of the check, stable. rule: which rule it is about. captured, wanted: the two values,
    None for one that is not known. fits: False makes it a refusal.
    """

    __slots__ = ("captured", "code", "fits", "rule", "wanted")

    def __init__(
        self, code: str, rule: int, captured: str | None, wanted: str | None, fits: bool
    ) -> None:
        self.code, self.rule, self.fits = code, rule, fits
        self.captured, self.wanted = captured, wanted

    def differences(self) -> tuple[str, str]:
        """Both values as text; of lists and objects only what is not in both."""
        if self.captured is None or self.wanted is None:
            return self.captured or UNKNOWN, self.wanted or UNKNOWN
        if self.fits:
            return self.captured, self.wanted
        return _without_common(self.captured, self.wanted)

    def __str__(self) -> str:
        """For the pod's author."""
        captured, wanted = map(_cut, self.differences())
        return f"{self.code}: the snapshot has {captured}, the pod asks for {wanted}"

    def __repr__(self) -> str:
        return f"Finding({self.code!r}, {self.captured!r}, {self.wanted!r}, {self.fits})"

    def as_json(self) -> dict[str, object]:
        """For programs. `captured` and `wanted` are whole; null is for what is not known."""
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
        return captured, wanted  # text that is no JSON, or odd JSON: a version, a name


def _cut(text: str) -> str:
    """A pod's author chose how long it is."""
    if len(text) <= _MOST_CHARS:
        return text
    return f"{text[:_MOST_CHARS]}… ({len(text)} characters)"


def _only_in(these: list[object], others: list[object]) -> list[object]:
    """Those that are not among the others, in one pass over each: both may be long."""
    known = {canonical(item) for item in others}
    return [item for item in these if canonical(item) not in known]


def _differences(have: object, want: object) -> tuple[object, object]:
    if isinstance(have, list) and isinstance(want, list):
        left, right = _only_in(have, want), _only_in(want, have)
        # Lists of the same items differ in their order, and then the whole is the difference.
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
