"""Times the steps of a capture or a restore, which may run side by side. Lean."""

from __future__ import annotations

import contextlib
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import TypeVar

    Seconds = TypeVar("Seconds")

BEGIN = "_at"
"""Behind a step's name: the key of its begin."""


class Steps(dict[str, float]):
    """Seconds by step, and under NAME_at the begin, in seconds after `since`.

    since: on `time.monotonic`; now, where nothing else is said.
    """

    def __init__(self, since: float | None = None) -> None:
        super().__init__()
        self.since = time.monotonic() if since is None else since

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time the `with`, whatever its end."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.add(name, began, time.monotonic())

    def add(self, name: str, began: float, ended: float) -> None:
        """Add a step that somebody else has timed, on `time.monotonic`."""
        self[name] = round(ended - began, 4)
        self[name + BEGIN] = round(began - self.since, 4)


def durations(steps: Mapping[str, Seconds]) -> dict[str, Seconds]:
    """Returns the steps without their begins."""
    return {name: seconds for name, seconds in steps.items() if not name.endswith(BEGIN)}
