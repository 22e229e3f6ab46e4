"""Accepts the regular expressions of a pod's author that we match against log lines.

`checked` refuses expressions that would take exponential time, so that the pod's author learns why:
back references, and repeated groups that repeat or choose inside. The rest is polynomial, which
still means hours for a long line: an extra process does the matching, with a limit to its processor
time (see shim.workload.logwatch).
"""

from __future__ import annotations

import re
import warnings
from typing import Final

MAX_LENGTH: Final = 256
MAX_REPEATS: Final = 3
MAX_CHOICES: Final = 10
"""Limit for `|` and `?` together: each may double the time."""
_PART = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{[0-9]*,?[0-9]*\}|[()|*+?]|.", re.DOTALL)
_BACK_REFERENCE = re.compile(r"\\[1-9]")
_NOT_OPTIONAL = ("(", "*", "+", "?")
"""A question mark after any of these is syntax, or makes a repetition lazy."""


def checked(pattern: str) -> str:
    """Returns `pattern` if short, valid and not exponential. Raises ValueError with the reason."""
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
    branchy = [False]  # per open group: whether anything in it repeats or chooses
    closed = False  # the same for the group that has just ended
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
        raise ValueError(
            f"the expression repeats over {MAX_REPEATS} or chooses over {MAX_CHOICES} times"
        )
