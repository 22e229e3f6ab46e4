"""JSON that somebody else may have written, or that a crash or a bad disk has changed. Lean."""

from __future__ import annotations

import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def parse(text: str | bytes) -> Any:
    """What is in `text`. Raises ValueError for everything that is no JSON.

    For json.loads that is not so: brackets that are nested too deep are a RecursionError, which
    passes every `except ValueError` of a caller.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
