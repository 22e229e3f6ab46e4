"""Room for captures: asked for before one begins, and again when its real size is known.

When there is none, snapshots that nobody uses go, the least recently used first. Where that does
not help nothing is removed, and the capture is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import time
from typing import TYPE_CHECKING

from shim.capture.estimate import on_disk
from shim.contract.errors import CaptureFailed, NoRoom, SnapshotTooBig
from shim.contract.names import SnapshotId
from shim.daemon.users import is_wanted, users
from shim.store.room import Candidate, Limits, disk, excess, victims

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from shim.daemon.config import Config
    from shim.daemon.registry import Registry
    from shim.daemon.reporter import Reporter
    from shim.store.store import Store

log = logging.getLogger("quickthawd")

_FULL_BYTES = 1 << 20
"""With less than this free on the disk, it is that which a capture failed for."""


class Room:
    """The store's room. All methods are of the event loop."""

    def __init__(
        self, config: Config, store: Store, registry: Registry, reporter: Reporter
    ) -> None:
        self._store, self._registry, self._reporter = store, registry, reporter
        self._evict, self._evict_after_s = config.evict, config.evict_after_s
        self._limits = Limits(
            config.max_snapshot_bytes, config.max_store_bytes, config.keep_free_bytes,
            config.keep_free_percent,
        )  # fmt: skip
        self._reserved = 0
        self._one_at_a_time = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def reserved(self, container: str, needed_bytes: int) -> AsyncIterator[None]:
        """Room for a capture that will probably take `needed_bytes`.

        Raises SnapshotTooBig, NoRoom.
        """
        self._check_size(container, needed_bytes, "will probably take")
        async with self._one_at_a_time:
            await self._make(
                container, self._reserved + needed_bytes, self._reserved + needed_bytes
            )
            self._reserved += needed_bytes
        try:
            with self._full_disk_told(container):
                yield
        finally:
            self._reserved -= needed_bytes

    async def admit(self, container: str, estimated_bytes: int, real_bytes: int) -> None:
        """What was captured takes `real_bytes` and is on the disk. Raises as `reserved` does."""
        self._check_size(container, real_bytes, "takes")
        async with self._one_at_a_time:
            others = self._reserved - estimated_bytes
            await self._make(container, others + real_bytes, others)

    def _check_size(self, container: str, found: int, does: str) -> None:
        most = self._limits.max_snapshot_bytes
        if most and found > most:
            raise SnapshotTooBig(
                "no snapshot of this size", container=container,
                why=f"it {does} {found} bytes, max_snapshot_bytes is {most}",
                do="Raise max_snapshot_bytes, or let the workload free memory when it is asked to "
                "(quickthaw.io/quiesce).",
            )  # fmt: skip

    async def _make(self, container: str, needed: int, new: int) -> None:
        used = await asyncio.to_thread(self._used)
        found = excess(self._limits, disk(self._store.root), used, needed, new)
        if found.size_bytes <= 0:
            return
        chosen = victims(found.size_bytes, self._candidates()) if self._evict else None
        if chosen is None:
            raise NoRoom(
                "no room for the snapshot", container=container, why=found.why,
                do="Remove snapshots with `quickthaw rm`, or change the limits." if self._evict
                else "Remove snapshots with `quickthaw rm`, or set evict = true.",
            )  # fmt: skip
        for each in chosen:
            await self._remove(each, container)

    def _used(self) -> int:
        names = list(self._store.damaged)
        damaged = sum(on_disk(str(self._store.snapshots / name)) for name in names)
        return damaged + sum(found.sizes.total for found in self._store.all())

    def _candidates(self) -> list[Candidate]:
        in_use, young = users(self._registry), time.time() - self._evict_after_s
        found = []
        for each in self._store.all():
            last, kept = self._store.last_use(each), self._store.quarantine.get(each.id)
            if each.id in in_use or (not kept and last > young) or is_wanted(self._registry, each):
                continue
            found.append(Candidate(each.id, each.sizes.total, last, useless=kept is not None))
        return found

    async def _remove(self, chosen: Candidate, container: str) -> None:
        """Remove one, unless a container came to use it while another was being removed."""
        if chosen.id in users(self._registry):
            raise NoRoom(
                "no room for the snapshot", container=container,
                why=f"snapshot {chosen.id[:12]} was to make room, and is in use now",
                do="The next pod like it is tried again.",
            )  # fmt: skip
        # Nothing is awaited between that look and this: nobody is given a ticket for it any more.
        withdrawn = self._store.withdraw(chosen.id)
        try:
            await asyncio.to_thread(self._store.remove, SnapshotId(chosen.id), users=[])
        except OSError as error:
            self._store.put_back(withdrawn)
            raise NoRoom(
                "no room for the snapshot", container=container,
                why=f"cannot remove {chosen.id[:12]}: {error}", do="Mend the store's file system.",
            ) from error  # fmt: skip
        self._reporter.evicted(chosen.id, chosen.size_bytes, chosen.last_use)

    @contextlib.contextmanager
    def _full_disk_told(self, container: str) -> Iterator[None]:
        """What fails because the disk is full says so."""
        try:
            yield
        except NoRoom:
            raise
        except (CaptureFailed, OSError) as error:
            if not self._is_full(error):
                raise
            raise NoRoom(
                "the disk is full", container=container, why=str(error),
                do=f"Free room on the file system of {self._store.root}, and raise keep_free.",
            ) from error  # fmt: skip

    def _is_full(self, error: BaseException | None) -> bool:
        while error is not None:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                return True
            error = error.__cause__
        return disk(self._store.root).free_bytes < _FULL_BYTES
