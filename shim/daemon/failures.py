"""Counts how the restores of each snapshot end, and puts failing snapshots into quarantine.

A single task takes the outcomes in their order, because writing to the disk must not keep a pod
waiting. When the daemon ends, it writes the rest.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shim.capture.sequence import finished
from shim.contract import outcome
from shim.contract.errors import Blame, NoSuchSnapshot, SwapTooLate
from shim.report.records import Quarantined
from shim.store.listing import told as why_quarantined

if TYPE_CHECKING:
    from collections.abc import Callable

    from shim.contract.outcome import Outcome
    from shim.daemon.tracked import Pod
    from shim.report.reporter import Reporter
    from shim.store.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Told:
    found: Outcome
    pod: Pod | None
    container: str
    then: Callable[[], None] | None


class OutcomeCounter:
    """Takes outcomes, and puts snapshots into quarantine.

    after: in how many pods in a row restores must fail for that, 0 for never. default_deadline_s:
    the node's deadline, for pods without a deadline of their own.
    """

    def __init__(
        self, store: Store, reporter: Reporter, *, after: int, default_deadline_s: float
    ) -> None:
        self._store, self._reporter, self._after = store, reporter, after
        self._default_deadline_s = default_deadline_s
        self._queue: asyncio.Queue[_Told] = asyncio.Queue()

    def told(
        self,
        found: Outcome,
        pod: Pod | None,
        container: str,
        then: Callable[[], None] | None = None,
    ) -> None:
        """Queue an outcome that `quickthaw-runc` has reported. pod: if known.

        then: the event loop calls it when the consequence for the snapshot is known.
        """
        self._queue.put_nowait(_Told(found, pod, container, then))

    async def serve(self) -> None:
        """Take outcomes from the queue, until cancelled."""
        try:
            while True:
                told = await self._queue.get()
                await finished(asyncio.to_thread(self._take, told))
                if told.then:
                    told.then()
        finally:
            while not self._queue.empty():
                self._take(self._queue.get_nowait())

    def _take(self, told: _Told) -> None:
        """Count an outcome. Never raises OSError: without the count the next pod tries again."""
        snapshot = told.found.snapshot
        if not snapshot or not self._exists(snapshot):
            return
        try:
            if told.found.result == outcome.RESTORED:
                self._store.quarantine.succeeded(snapshot)
                self._store.used(snapshot)
                return
            record = self._store.quarantine.failed(
                snapshot, blame=self._blame(told.found), after=self._after,
                error_class=told.found.error_class, reason=told.found.error,
                cause=told.pod.uid if told.pod else "",
            )  # fmt: skip
        except OSError as error:
            log.error("cannot record the outcome of a restore from %s: %s", snapshot[:12], error)
            return
        if record:
            self._reporter.tell(
                Quarantined(
                    subject=told.pod.subject(told.container) if told.pod else None,
                    snapshot=snapshot, reason=record.error_class, why=why_quarantined(record),
                )
            )  # fmt: skip

    def _blame(self, found: Outcome) -> str:
        """Returns the blame. A missed deadline counts only if not shorter than the default."""
        is_short = 0 < found.deadline_s < self._default_deadline_s
        if found.error_class == SwapTooLate.__name__ and is_short:
            return Blame.OTHER
        return found.blame

    def _exists(self, snapshot: str) -> bool:
        try:
            return self._store.get(snapshot).id == snapshot
        except NoSuchSnapshot:
            return False
