"""Finds room for captures: before a capture begins, and again when its real size is known.

When there is no room, an eviction removes snapshots that nobody uses, the least recently used
first, and snapshots of the capture's own namespace before others. If that does not help, nothing is
removed and the capture is refused. Evictions make room for bytes that exist: for the store's
limits when the snapshot is made and its size known; for the disk's limits while the copy grows, as
far as it has grown. Neither the request for a capture nor an estimate removes anything.

The space that stays free is never lent to a copy: kubelet evicts pods when the disk is full.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shim.capture.sequence import finished
from shim.contract.errors import CaptureFailed, NoRoom, SnapshotTooBig
from shim.contract.names import SnapshotId
from shim.daemon.users import is_wanted, users
from shim.kernel.stopping import Stop
from shim.report.records import Evicted
from shim.source.estimate import Amount, amount
from shim.store.room import (
    Candidate,
    Disk,
    Excess,
    Limits,
    Shares,
    disk,
    excess,
    shares,
    victims,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from shim.daemon.config import Config
    from shim.daemon.registry import Registry
    from shim.report.reporter import Reporter
    from shim.store.store import Store

log = logging.getLogger("quickthawd")

_MAKE_ROOM = (
    "Remove snapshots with `quickthaw rm`, or change the limits: snapshots of other namespaces go "
    "only beyond their share."
)
_EVICT = "Remove snapshots with `quickthaw rm`, or set evict = true."
_NOTHING = Amount(0, 0)
_FULL_BYTES = 1 << 20
"""With less free space than this, a failed capture has failed because the disk is full."""
_LOOK_S = 0.05
"""The kernel has no event for a disk that fills. A copy writes 100 MiB meanwhile."""
_SPARE_BYTES, _SPARE_PERCENT = 256 << 20, 1
"""Without a limit a copy still gets room before the disk is full: the smaller of the two."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The need of a capture. there: its part on the disk. reserved: for this capture."""

    container: str
    namespace: str
    amount: Amount
    there: Amount = _NOTHING
    reserved: Amount = _NOTHING


class Room:
    """The store's room. Call all methods on the event loop."""

    def __init__(
        self, config: Config, store: Store, registry: Registry, reporter: Reporter
    ) -> None:
        self._store, self._registry, self._reporter = store, registry, reporter
        self._evict, self._evict_after_s = config.evict, config.evict_after_s
        self._limits = Limits(
            config.max_snapshot_bytes, config.max_store_bytes, config.keep_free_bytes,
            config.keep_free_percent, config.max_namespace_bytes, config.namespace_percent,
        )  # fmt: skip
        self._reserved: dict[str, Amount] = {}
        self._amounts: dict[str, Amount] = {}
        self._one_at_a_time = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def reserved(self, container: str, namespace: str, needed: Amount) -> AsyncIterator[None]:
        """Reserve room for a capture whose estimate is `needed`. Removes nothing.

        namespace: of Kubernetes. Raises SnapshotTooBig, NoRoom.
        """
        self._check_size(container, needed.size_bytes, "will probably take")
        async with self._one_at_a_time:
            await self._make(_Wanted(container, namespace, needed), self._limits, remove=False)
            self._reserved[namespace] = self._reserved.get(namespace, _NOTHING).plus(needed)
        try:
            with self._full_disk_told(container):
                yield
        finally:
            self._reserved[namespace] = self._reserved[namespace].less(needed)

    async def check(self, container: str, namespace: str) -> None:
        """Check that the disk has room for all reservations, or can get it. Raises NoRoom."""
        async with self._one_at_a_time:
            await self._make(
                _Wanted(container, namespace, _NOTHING), self._of_disk(), remove=False
            )  # fmt: skip

    @contextlib.asynccontextmanager
    async def followed(self, container: str, namespace: str) -> AsyncIterator[None]:
        """Within this, remove snapshots when the disk gets too full by what is copied.

        If that is impossible, the copy goes on, and `admit` refuses the snapshot.
        """
        ended = asyncio.Event()
        before = await asyncio.to_thread(disk, self._store.root)
        following = asyncio.create_task(
            self._follow(_Wanted(container, namespace, _NOTHING), before, ended)
        )
        try:
            yield
        finally:
            ended.set()
            await finished(following)  # to its end: a removal is not to be cancelled

    async def _follow(self, wanted: _Wanted, before: Disk, ended: asyncio.Event) -> None:
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await ended.wait()
            try:
                async with self._one_at_a_time:
                    await self._keep_free(wanted, before)
            except (NoRoom, OSError) as error:
                log.info("no eviction during the copy of %s: %s", wanted.container[:12], error)
                return

    async def _keep_free(self, wanted: _Wanted, before: Disk) -> None:
        """Remove snapshots for what the disk has less than `before`. Raises NoRoom."""
        there = await asyncio.to_thread(disk, self._store.root)
        spare = min(_SPARE_BYTES, there.size_bytes * _SPARE_PERCENT // 100)
        kept = max(self._limits.keep_free_bytes, spare)
        limits = replace(self._of_disk(), keep_free_bytes=kept)
        found = excess(limits, there, 0, 0, 0)
        copies = sum((each.size_bytes for each in self._reserved.values()), 0)
        grown = replace(  # others write to the disk, too
            found,
            size_bytes=min(found.size_bytes, before.free_bytes - there.free_bytes, copies),
            inodes=min(found.inodes, before.free_inodes - there.free_inodes),
        )
        if grown.fits:
            return
        used = await asyncio.to_thread(self._used)
        given = shares(limits, there, used, wanted.namespace, self._own(wanted))
        for each in self._chosen(wanted, grown, self._candidates(), given):
            await self._remove(each, wanted.container)

    def _of_disk(self) -> Limits:
        return replace(self._limits, max_store_bytes=0, max_namespace_bytes=0)

    async def admit(self, container: str, namespace: str, estimated: Amount, real: Amount) -> None:
        """Admit a capture on the disk, of size `real`. Raises SnapshotTooBig, NoRoom."""
        self._check_size(container, real.size_bytes, "takes")
        wanted = _Wanted(container, namespace, real, real, estimated)
        async with self._one_at_a_time:
            await self._make(wanted, self._limits)

    def _check_size(self, container: str, found: int, does: str) -> None:
        most = self._limits.max_snapshot_bytes
        if most and found > most:
            raise SnapshotTooBig(
                "no snapshot of this size", about=container,
                why=f"it {does} {found} bytes, max_snapshot_bytes is {most}",
                do="Raise max_snapshot_bytes, or let the workload free memory when it is asked to "
                "(quickthaw.io/quiesce).",
            )  # fmt: skip

    async def _make(self, wanted: _Wanted, limits: Limits, *, remove: bool = True) -> None:
        """Remove snapshots, or see whether a removal would suffice. Raises NoRoom."""
        await self._make_in_namespace(wanted, limits, remove)
        used = await asyncio.to_thread(self._used)
        there = disk(self._store.root)
        needed = wanted.amount.less(wanted.reserved)
        for reserved in self._reserved.values():
            needed = needed.plus(reserved)
        new = needed.less(wanted.there)
        found = excess(
            limits, there, sum(used.values()), needed.size_bytes, new.size_bytes, new.entries
        )  # fmt: skip
        own = self._own(wanted)
        given = shares(limits, there, used, wanted.namespace, own)
        for each in self._chosen(wanted, found, self._candidates(), given):
            if remove:
                await self._remove(each, wanted.container)

    async def _make_in_namespace(self, wanted: _Wanted, limits: Limits, remove: bool) -> None:
        """Keep within the quota of the namespace, by removing only its own snapshots."""
        most, name = limits.max_namespace_bytes, wanted.namespace
        if most:
            used = await asyncio.to_thread(self._used)
            would = used.get(name, 0) + self._own(wanted)
            why = (
                f"the snapshots of namespace {name} would take {would} bytes, max_namespace_bytes "
                f"is {most}"
            )
            own = [each for each in self._candidates() if each.namespace == name]
            for each in self._chosen(wanted, Excess(would - most, why), own, Shares(name)):
                if remove:
                    await self._remove(each, wanted.container)

    def _own(self, wanted: _Wanted) -> int:
        """Returns the bytes that all captures under way of the namespace will take."""
        reserved = self._reserved.get(wanted.namespace, _NOTHING)
        return reserved.less(wanted.reserved).plus(wanted.amount).size_bytes

    def _chosen(
        self, wanted: _Wanted, found: Excess, candidates: list[Candidate], given: Shares
    ) -> list[Candidate]:
        """Returns the snapshots to remove. Raises NoRoom when the candidates are not enough."""
        if found.fits:
            return []
        chosen = None
        if self._evict:
            chosen = victims(found.size_bytes, candidates, given, found.inodes)
        if chosen is None:
            raise NoRoom(
                "no room for the snapshot", about=wanted.container, why=found.why,
                do=_MAKE_ROOM if self._evict else _EVICT,
            )  # fmt: skip
        return chosen

    def _used(self) -> dict[str, int]:
        """Returns bytes on disk by namespace; damaged snapshots count under the empty name."""
        used: Counter[str] = Counter()
        for name in list(self._store.damaged):
            used[""] += self._damaged(name).size_bytes
        for found in self._store.all():
            used[found.source.namespace] += found.sizes.total
        return used

    def _damaged(self, name: str) -> Amount:
        """Returns the size of a snapshot with a damaged manifest. Such a snapshot never changes."""
        if name not in self._amounts:
            place = str(self._store.snapshots / name)
            self._amounts[name] = amount(place, Stop(), limited=False)
        return self._amounts[name]

    def _candidates(self) -> list[Candidate]:
        in_use, young = users(self._registry), time.time() - self._evict_after_s
        found = []
        for name in self._store.damaged.keys() - in_use.keys() & self._amounts.keys():
            its = self._amounts[name]  # of an older version, or really damaged: of no use
            found.append(Candidate(name, its.size_bytes, 0.0, useless=True, entries=its.entries))
        for each in self._store.all():
            last, kept = self._store.last_use(each), self._store.quarantine.get(each.id)
            if each.id in in_use or (not kept and last > young) or is_wanted(self._registry, each):
                continue
            useless, sizes = kept is not None, each.sizes
            found.append(
                Candidate(each.id, sizes.total, last, useless, each.source.namespace, sizes.entries)
            )
        return found

    async def _remove(self, chosen: Candidate, container: str) -> None:
        """Remove a snapshot. Raises NoRoom if a container uses it since the choice was made."""
        if chosen.id in users(self._registry):
            raise NoRoom(
                "no room for the snapshot", about=container,
                why=f"snapshot {chosen.id[:12]} was to make room, and is in use now",
                do="The next pod like it is tried again.",
            )  # fmt: skip
        # Nothing is awaited between that look and this: nobody gets a ticket for it any more.
        withdrawn = self._store.withdraw(chosen.id)
        try:
            await asyncio.to_thread(self._store.remove, SnapshotId(chosen.id), users=[])
        except OSError as error:
            self._store.put_back(withdrawn)
            raise NoRoom(
                "no room for the snapshot", about=container,
                why=f"cannot remove {chosen.id[:12]}: {error}", do="Mend the store's file system.",
            ) from error  # fmt: skip
        self._reporter.tell(
            Evicted(snapshot=chosen.id, size_bytes=chosen.size_bytes, last_use=chosen.last_use)
        )

    @contextlib.contextmanager
    def _full_disk_told(self, container: str) -> Iterator[None]:
        """Raise NoRoom for a failure that has its cause in a full disk."""
        try:
            yield
        except NoRoom:
            raise
        except (CaptureFailed, OSError) as error:
            if not self._is_full(error):
                raise
            raise NoRoom(
                "the disk is full", about=container, why=str(error),
                do=f"Free room on the file system of {self._store.root}, and raise keep_free.",
            ) from error  # fmt: skip

    def _is_full(self, error: BaseException | None) -> bool:
        while error is not None:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                return True
            error = error.__cause__
        return disk(self._store.root).free_bytes < _FULL_BYTES
