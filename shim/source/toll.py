"""Checks that the source outlived its capture: the cgroup's count of OOM kills, and its processes.

A capture must cost its source nothing. If the kernel killed the container's processes for lack of
memory meanwhile, nobody knows the capture's part in that, and which of the processes are in the
snapshot: such a snapshot is not published. A CRIU that is killed can take processes with it that
execute its code at that moment: they meet a breakpoint without a tracer. Blocking.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING

from shim.contract.errors import CriuDumpFailed, SourceHarmed
from shim.criu.log import Cut
from shim.kernel.cgroup import Freezer, OomKills
from shim.source.source import own_freezer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shim.source.source import Source

_FALLS_WITHIN_S = 3.0
"""Such a process falls when it runs next, which may take its time on a loaded machine."""
_LOOK_S = 0.02


@contextlib.contextmanager
def outlives_criu(source: Source) -> Iterator[list[int]]:
    """Raises SourceHarmed in the place of CriuDumpFailed if a process ended with CRIU.

    Yields a list for the processes of the frozen window, after which the container runs again. A
    process that the end of CRIU ends does so when it runs next. Nobody tells us of the ends of
    others' children: hence the polling, for 3 s after a CRIU that did not end by itself.
    """
    pids: list[int] = []
    freezer = own_freezer(source)
    try:
        yield pids
    except CriuDumpFailed as error:
        if isinstance(error.__cause__, Cut) and (why := _fallen(source.pid, freezer, pids)):
            raise SourceHarmed(
                "the source did not outlive its capture", about=source.container,
                why=f"{why}, with CRIU: {error.why}",
                do="Look for why CRIU did not end. The workload may need a restart.",
            ) from error  # fmt: skip
        raise


def _fallen(init: int, freezer: Freezer, pids: Sequence[int]) -> str:
    """Returns which of the processes end within 3 s; empty if none does."""
    until = time.monotonic() + _FALLS_WITHIN_S
    while time.monotonic() < until:
        try:
            gone = set(pids).difference(freezer.pids())
        except FileNotFoundError:
            gone = {init}
        if init in gone:
            return "the container ended during its capture"
        if gone:
            return f"process {min(gone)} of the node, one of the container's, ended"
        time.sleep(_LOOK_S)
    return ""


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
