"""Holds the containers that opted in and exist, with the decision and the outcome for each."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from shim.contract import outcome
from shim.contract.paths import CONTAINERS, CONTROL, OUTCOMES, SWAPPED, TICKETS
from shim.kernel import replace
from shim.restore.forget import forget

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from shim.daemon.tracked import Tracked

log = logging.getLogger(__name__)


class Registry:
    """All tracked containers by id. Also removes files that belong to no tracked container."""

    def __init__(self) -> None:
        self._tracked: dict[str, Tracked] = {}

    def __iter__(self) -> Iterator[Tracked]:
        return iter(list(self._tracked.values()))

    def add(self, tracked: Tracked) -> None:
        """Track a container."""
        self._tracked[tracked.container] = tracked

    def get(self, container: str) -> Tracked | None:
        """Returns the tracked container with this id, or None."""
        return self._tracked.get(container)

    def remove(self, container: str) -> Tracked | None:
        """Forget the container. Returns its record, or None."""
        removed = self._tracked.pop(container, None)
        if removed:
            removed.let_go()
        return removed

    def replace_all(self, found: Iterable[Tracked]) -> dict[str, Tracked]:
        """Keep the records of `found`, add new containers, drop the rest. Returns all by id."""
        before = self._tracked
        self._tracked = {
            tracked.container: before.get(tracked.container, tracked) for tracked in found
        }
        for container in before.keys() - self._tracked.keys():
            before[container].let_go()
        return self._tracked

    def sweep(self) -> list[outcome.Outcome]:
        """Remove the remains of other containers that an earlier daemon, or a killed swap, left.

        Returns the outcomes of containers that were created and removed while the daemon was down.
        """
        left = {
            name for directory in (CONTAINERS, CONTROL, SWAPPED) for name in os.listdir(directory)
        }
        for name in os.listdir(TICKETS):
            if name.endswith(".json"):
                left.add(name.removesuffix(".json"))
            else:
                os.unlink(f"{TICKETS}/{name}")  # its writer was killed
        for container in sorted(left - self._tracked.keys()):
            try:
                forget(container)
            except (OSError, ValueError) as error:
                log.error("cannot remove the files of the ended container %s: %s", container, error)
        missed = []
        for name in os.listdir(OUTCOMES):
            if name.removesuffix(".json") not in self._tracked:
                if found := _last_words(name):
                    missed.append(found)
                replace.take_away(f"{OUTCOMES}/{name}")
        return sorted(missed, key=lambda found: found.at)


def _last_words(name: str) -> outcome.Outcome | None:
    try:
        return outcome.take(name.removesuffix(".json"))
    except (OSError, ValueError):
        return None  # half written: its writer was killed
