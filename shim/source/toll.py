"""Checks that the source outlived its capture: the cgroup's count of OOM kills, and its processes.

A capture must cost its source nothing. If the kernel killed the container's processes for lack of
memory meanwhile, nobody knows the capture's part in that, and which of the processes are in the
snapshot: such a snapshot is not published. Blocking.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from shim.contract.errors import SourceHarmed
from shim.kernel.cgroup import OomKills
from shim.source.source import own_freezer

if TYPE_CHECKING:
    from shim.source.source import Source


class Toll:
    """Counts from now on. Raises OSError, ValueError."""

    def __init__(self, source: Source) -> None:
        self._container = source.container
        self._freezer, self._kills = own_freezer(source), OomKills.of(source.pid)
        if source.container not in os.path.basename(self._kills.path):
            raise ValueError(f"process {source.pid} is in {self._kills.path}: has it ended?")
        self._had, self._killed = set(self._freezer.pids()), self._kills.count()

    def check(self) -> None:
        """Raises SourceHarmed if the container has ended, or the OOM killer has killed in it."""
        try:
            killed = self._kills.count() - self._killed
            gone = self._had - set(self._freezer.pids())
        except FileNotFoundError as error:
            raise self._harmed(
                "its cgroup is gone: the container ended during its capture"
            ) from error
        if killed:
            raise self._harmed(
                f"the OOM killer killed {killed} processes of the container during its capture "
                f"({len(gone)} of {len(self._had)} that there were are gone)"
            )

    def _harmed(self, why: str) -> SourceHarmed:
        return SourceHarmed(
            "the source did not outlive its capture", about=self._container, why=why,
            do="Raise the container's memory limit: the container needs all of the present limit.",
        )  # fmt: skip
