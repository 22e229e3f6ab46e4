"""Keeps an address space that is being filled: the missing ranges, and the kernel's events.

Not thread-safe by itself: `shim.memory.serve.filling` rules which thread may do what when. The
kernel's messages are read while all copying is stopped: a copy between the reading of an event and
its application could bring back memory that the process has just given up.
"""

from __future__ import annotations

import contextlib
import os
import select
import time

from shim.kernel import userfault
from shim.kernel.userfault import (
    FAULT,
    FORK,
    PAGE,
    REMAP,
    Changing,
    Gone,
    NotOurs,
    Present,
)
from shim.memory.serve.events import settle
from shim.memory.serve.forked import Children

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shim.kernel.userfault import Message
    from shim.memory.extents import Extent, Extents
    from shim.memory.serve.payload import Payload

AROUND_BYTES = 64 << 10
"""Filled with a page fault, aligned: costs about as much as the fault itself. Of pages without
content we fill the pages behind the address: processes use fresh memory mostly from its start
on."""
_SETTLES_S = 0.001
_SOON_S = 0.00005
_TURN_S = 0.0005
"""A thread whose event was read goes on at once; a thread without processor needs this."""
_TURNS = 20
"""After so many turns we do not wait: a thread that moves without end is quiet only briefly."""
_UNSETTLED_S = 30.0


class Unsettled(Exception):
    """The end of a change that the kernel has begun did not come."""


class Space:
    """An address space. fd: the userfaultfd, which the space owns. pid: in the container, or 0.

    The pid is 0 for a child of unknown pid. missing: the extents still to be filled from `payload`.
    areas: see `shim.memory.serve.events`. told: events that were read already: `listen` applies
    them before it does anything else.
    """

    def __init__(
        self,
        fd: int,
        pid: int,
        missing: Extents,
        payload: Payload | None,
        areas: Extents,
        told: Sequence[list[Message]] = (),
    ) -> None:
        self.fd, self.pid, self.missing, self.payload = fd, pid, missing, payload
        self._areas, self.told = areas, list(told)
        self.is_gone = False
        self.cursor = 0
        self.waiting: list[int] = []
        """Page faults that could not be served because the space was changing."""

    def fileno(self) -> int:
        """Returns the userfaultfd, for poll."""
        return self.fd

    def close(self) -> None:
        """Close the userfaultfd: areas become ordinary, missing pages read as zeros. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def fill(self, extent: Extent) -> list[Extent]:
        """Fill an extent that was taken from `missing`. Returns the extents that must be put back.

        Raises Gone; payload.Damaged; OSError, with the extent still missing.
        """
        assert self.payload is not None  # noqa: S101 - nothing is missing without a payload
        start, end, offset = extent
        while start < end:
            try:
                done = self._copied(start, end, offset)
            except Changing:
                return [(start, end, offset)]
            except Present:  # the process has written there meanwhile, or we have
                done = PAGE
            except NotOurs:
                if userfault.is_changing(self.fd):  # just moved: an event will tell the new place
                    return [(start, end, offset)]
                if end - start > PAGE:  # the range was unmapped in part, or is several areas
                    middle = start + (end - start) // (2 * PAGE) * PAGE
                    rest = self.fill((start, middle, offset))
                    if rest:
                        return [*rest, (middle, end, offset + middle - start)]
                    done = middle - start
                else:
                    done = PAGE
            start, offset = start + done, offset + done
        return []

    def _copied(self, start: int, end: int, offset: int) -> int:
        assert self.payload is not None  # noqa: S101
        with self.payload.at(offset, end - start) as (address, size):
            return userfault.copy(self.fd, start, address, size)

    def serve(self, address: int, asked: Callable[[int, int], None]) -> None:
        """Give a thread the page that it waits for, and neighbours. All copying must be stopped.

        asked: is called when content was still missing there. Raises as `fill` does.
        """
        page = address - address % PAGE
        start = address - address % AROUND_BYTES
        wanted = self.missing.take(start, start + AROUND_BYTES)
        if wanted:
            asked(self.pid, address)
        # The page that the thread waits for comes first.
        wanted.sort(key=lambda each: not each[0] <= page < each[1])
        for number, extent in enumerate(wanted):
            if rest := self.fill(extent):
                self.missing.put([*rest, *wanted[number + 1 :]])
                self.waiting.append(address)
                return
        if not any(each[0] <= page < each[1] for each in wanted):
            self._zero(page, start + AROUND_BYTES)

    def _zero(self, page: int, end: int) -> None:
        """Install a page without content, and pages behind; or wake the thread if it is there."""
        try:
            userfault.zero(self.fd, page, end - page)
        except Present:
            with contextlib.suppress(OSError):  # no thread waits any more
                userfault.wake(self.fd, page, PAGE)
        except Changing:
            self.waiting.append(page)
        except NotOurs:
            if end - page > PAGE:  # the area ends before
                self._zero(page, page + PAGE)

    def listen(self) -> tuple[list[int], list[Space]]:
        """Read the kernel's messages and apply the events. All copying must be stopped.

        Returns the page faults to be served, and the spaces of new children. Raises Unsettled,
        OSError.
        """
        faults, self.waiting = self.waiting, []
        events: list[Message] = []
        children = Children()
        until = time.monotonic() + _UNSETTLED_S
        turn = 0
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        while True:
            told = self.told.pop(0) if self.told else userfault.messages(self.fd)
            faults += [message.start for message in told if message.kind == FAULT]
            turn += bool(told)
            for message in told:
                message.turn = turn
            events += [message for message in told if message.kind != FAULT]
            children.look_at(events, self._areas)
            if self.told:
                continue
            if not told and not userfault.is_changing(self.fd):
                try:
                    return faults, self._settled(events, children)
                except Changing:
                    continue
            if time.monotonic() > until:
                raise Unsettled(
                    f"process {self.pid} kept changing its memory for {_UNSETTLED_S:.0f} s"
                )
            if not told:
                poll.poll(_SETTLES_S * 1000)
            elif turn < _TURNS and any(event.kind in (REMAP, FORK) for event in events):
                self._let_others_tell()

    def _let_others_tell(self) -> None:
        """Wait while changes are under way: each blocks the threads behind it until it is read."""
        time.sleep(_SOON_S)
        if userfault.is_changing(self.fd):
            time.sleep(_TURN_S)

    def _settled(self, events: Sequence[Message], children: Children) -> list[Space]:
        if not events:
            return []
        found = settle(events, self.missing, self._areas, self._is_registered, children.had)
        self.cursor = 0
        return [
            Space(fd, 0, missing, self.payload, areas, children.told(fd))
            for fd, missing, areas in found
        ]

    def _is_registered(self, start: int, end: int) -> bool:
        try:
            return userfault.is_registered(self.fd, start, end - start)
        except Gone:
            return False

    def is_ready(self, start: int, end: int) -> bool:
        """Whether everything that is missing between two addresses lies in registered areas."""
        try:
            return all(self._is_registered(*each[:2]) for each in self.missing.within(start, end))
        except Changing:
            return False

    def next_piece(self, size: int) -> Extent | None:
        """Take up to `size` bytes of the missing extents, in the order of addresses."""
        found = self.missing.take_next(self.cursor, size) or self.missing.take_next(0, size)
        if found:
            self.cursor = found[1]
        return found

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do for this space."""
        return self.is_gone or not self.missing
