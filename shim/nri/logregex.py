"""Which regular expressions of a pod's author we match against its log lines.

What would take exponential time is refused here, where the pod's author is told why: back
references, and repeated groups that repeat or choose inside. What remains is polynomial, which is
hours for a long line all the same: it is matched in a process of its own, with a limit to its
processor's time (see shim.capture.logwatch).
"""

from __future__ import annotations

import re
import warnings
from typing import Final

MAX_LENGTH: Final = 256
MAX_REPEATS: Final = 3
MAX_CHOICES: Final = 10
"""Of `|` and `?` together: each may double the time."""
_PART = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{[0-9]*,?[0-9]*\}|[()|*+?]|.", re.DOTALL)
_BACK_REFERENCE = re.compile(r"\\[1-9]")
_NOT_OPTIONAL = ("(", "*", "+", "?")
"""A question mark after one of these is syntax or makes it lazy."""


def checked(pattern: str) -> str:
    """`pattern`, if it is short, compiles and cannot blow up. Raises ValueError with why not."""
    if not 0 < len(pattern) <= MAX_LENGTH:
        raise ValueError(f"not of 1 to {MAX_LENGTH} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise ValueError(f"not a regular expression: {error}") from error
    _refuse_slow(pattern)
    return pattern


def _refuse_slow(pattern: str) -> None:
    repeats = choices = 0
    branchy = [False]  # per open group: does anything in it repeat or choose
    closed = False  # the group that has just ended: did anything in it
    before = ""
    for part in _PART.findall(pattern):
        repeated = part in ("*", "+") or (part[0] == "{" and len(part) > 2)
        chosen = part == "|" or (part == "?" and before not in _NOT_OPTIONAL)
        if repeated and closed:
            raise ValueError("a repeated group must not repeat or choose inside")
        if _BACK_REFERENCE.match(part):
            raise ValueError("back references are not allowed")
        repeats, choices = repeats + repeated, choices + chosen
        branchy[-1] = branchy[-1] or repeated or chosen
        closed = False
        if part == "(":
            branchy.append(False)
        elif part == ")":
            closed = branchy.pop()
            branchy[-1] = branchy[-1] or closed
        before = part
    if "(?P=" in pattern:
        raise ValueError("back references are not allowed")
    if repeats > MAX_REPEATS or choices > MAX_CHOICES:
        raise ValueError(f"it repeats over {MAX_REPEATS} or chooses over {MAX_CHOICES} times")
