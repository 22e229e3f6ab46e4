"""What the ends of swaps say about the snapshots: counts, and quarantine when it is enough.

Outcomes are taken in their order by one task, because writing to the disk must not keep a pod
waiting. What was not written when the daemon ends is written then.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shim.capture.sequence import finished
from shim.contract import outcome
from shim.contract.errors import Blame, NoSuchSnapshot, SwapTooLate
from shim.contract.names import is_snapshot_id

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from shim.daemon.registry import Pod
    from shim.daemon.reporter import Reporter
    from shim.store.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Told:
    found: Mapping[str, object]
    pod: Pod | None
    container: str
    then: Callable[[], None] | None


class Health:
    """after: pods in a row whose failures put a snapshot into quarantine, 0 for never.

    default_deadline_s: of the node, for pods that have none of their own.
    """

    def __init__(
        self, store: Store, reporter: Reporter, *, after: int, default_deadline_s: float
    ) -> None:
        self._store, self._reporter, self._after = store, reporter, after
        self._default_deadline_s = default_deadline_s
        self._queue: asyncio.Queue[_Told] = asyncio.Queue()

    def told(
        self, found: Mapping[str, object], pod: Pod | None, container: str,
        then: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """`quickthaw-runc` told how a swap ended. pod: where it is known.

        then: called on the event loop when what follows for the snapshot is known.
        """
        self._queue.put_nowait(_Told(found, pod, container, then))

    async def serve(self) -> None:
        """Take up what is told, until cancelled."""
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
        """One outcome. Never raises OSError: without a count the next pod tries again."""
        snapshot = str(told.found.get("snapshot") or "")
        if not is_snapshot_id(snapshot) or not self._exists(snapshot):
            return
        try:
            if told.found.get("result") == outcome.RESTORED:
                self._store.quarantine.succeeded(snapshot)
                self._store.used(snapshot)
                return
            record = self._store.quarantine.failed(
                snapshot, blame=self._blame(told.found), after=self._after,
                error_class=str(told.found.get("error_class")), reason=str(told.found.get("error")),
                cause=told.pod.uid if told.pod else "",
            )  # fmt: skip
        except OSError as error:
            log.error("cannot note how the restore from %s went: %s", snapshot[:12], error)
            return
        if record:
            self._reporter.quarantined(snapshot, record, told.pod, told.container)

    def _blame(self, found: Mapping[str, object]) -> str:
        """A deadline that passes says something only where the node's own would have passed."""
        deadline_s = found.get("deadline_s")
        is_short = isinstance(deadline_s, int | float) and deadline_s < self._default_deadline_s
        if found.get("error_class") == SwapTooLate.__name__ and is_short:
            return Blame.OTHER
        return str(found.get("blame"))

    def _exists(self, snapshot: str) -> bool:
        try:
            return self._store.get(snapshot).id == snapshot
        except NoSuchSnapshot:
            return False
