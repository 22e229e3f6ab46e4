"""The event stress test, as `make storm` runs it: its result is part of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.bench.result import Results


def run(seconds: int, results: Results, tell: Callable[[str], None]) -> None:
    raise NotImplementedError
