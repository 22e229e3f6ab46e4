"""Parses and writes JSON that others may have written, or that a crash or bad disk damaged. Lean.

Avoids the package `json`, whose regular expressions take 7 ms of a pod's start: we call CPython's
scanner, which that package uses, directly.
"""

from __future__ import annotations

try:
    from _json import encode_basestring_ascii as _quoted
    from _json import make_scanner
except ImportError:  # a Python without the C module
    from json.encoder import encode_basestring_ascii as _quoted
    from json.scanner import make_scanner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_BLANKS = " \t\n\r"
_TOO_DEEP = "nested too deep"


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


class _Settings:
    """The attributes that a scanner reads from its decoder (Lib/json/decoder.py since 3.1)."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float, parse_int, parse_constant = float, int, staticmethod(_constant)
    memo: dict[str, str] = {}  # noqa: RUF012 - used by the scanner that is not written in C


_scan = make_scanner(_Settings())  # type: ignore[arg-type] # typeshed takes one from another


def parse(text: str | bytes) -> Any:
    """Returns the JSON value in `text`. Raises ValueError if `text` is not JSON in UTF-8.

    json.loads is less strict: it raises RecursionError for brackets that are nested too deep, which
    no `except ValueError` of a caller catches; and it accepts NaN.
    """
    plain = (text if isinstance(text, str) else text.decode()).strip(_BLANKS)
    try:
        value, end = _scan(plain, 0)
    except StopIteration as stop:
        raise ValueError(f"not JSON at character {stop.value}") from None
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    if end != len(plain):
        raise ValueError(f"more than one value of JSON, at character {end}")
    return value


def compose(value: object) -> str:
    """Returns `value` as json.dumps writes it. Raises ValueError, TypeError if JSON cannot."""
    try:
        return _composed(value, sort=False, comma=", ", colon=": ")
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error


def canonical(value: object) -> str:
    """Returns `value` in the form that digests and comparisons use: sorted, without blanks.

    Raises ValueError, TypeError as `compose` does.
    """
    try:
        return _composed(value, sort=True, comma=",", colon=":")
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error


_WORDS = {None: "null", True: "true", False: "false"}


def _composed(value: object, *, sort: bool, comma: str, colon: str) -> str:
    if isinstance(value, str):
        return _quoted(value)
    if value is None or isinstance(value, bool):
        return _WORDS[value]
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        if value - value:  # infinite, or not a number
            raise ValueError(f"{value} is no number of JSON")
        return float.__repr__(value)
    if isinstance(value, list | tuple):
        inner = [_composed(each, sort=sort, comma=comma, colon=colon) for each in value]
        return f"[{comma.join(inner)}]"
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("a key that is no string")
        inner = [
            _quoted(key) + colon + _composed(value[key], sort=sort, comma=comma, colon=colon)
            for key in (sorted(value) if sort else value)
        ]
        return f"{{{comma.join(inner)}}}"
    raise TypeError(f"{type(value).__name__} is nothing of JSON")
