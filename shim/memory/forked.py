"""What a child had registered at the moment of its fork: it tells where the fork belongs among
changes of its parent that were told at about the same time.

The child runs as soon as its fork was read. So it is asked at once, about all that its parent is
known to have: what it will be about is told later. What it has changed before it was asked is
read, until it stands still for the question; elsewhere it has what it had.
"""

from __future__ import annotations

import contextlib
import time

from shim.kernel import userfault
from shim.kernel.userfault import FORK, REMAP, REMOVE, Changing, Gone
from shim.memory.events import spans
from shim.memory.extents import Extents

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from shim.kernel.userfault import Message
    from shim.memory.extents import Extent

_MOST_AREAS = 1000
"""Asked about: a millisecond or two."""
_PATIENCE_S = 0.2
"""A child may have lost its processor in the middle of a change, for several time slices of others.
It is waited for so long, and for all that were forked together: faults wait, too."""
_PAUSE_S = 0.0001


class Patience:
    """With children that do not stand still: over some time after it was asked for first."""

    def __init__(self) -> None:
        self._until = 0.0

    @property
    def is_over(self) -> bool:
        """Whether what is not known by now is not to be waited for."""
        now = time.monotonic()
        self._until = self._until or now + _PATIENCE_S
        return now > self._until


class Forked:
    """A child. fd: its descriptor, which somebody else owns.

    told: what was read from it, turn by turn, to be taken into account before anything else is.
    """

    def __init__(self, fd: int, patience: Patience) -> None:
        self.fd, self._patience = fd, patience
        self.told: list[list[Message]] = []
        self._known: dict[int, bool | None] = {}
        self._whole = Extents()

    def look_at(self, addresses: Iterable[int]) -> None:
        """Ask about these now, as long as it stands still. Raises OSError."""
        with contextlib.suppress(Changing, Gone):
            for address in addresses:
                self._look(address)

    def look_at_areas(self, areas: Iterable[Extent]) -> None:
        """The same about areas that it may have, before anything else was read from it."""
        whole = []
        with contextlib.suppress(Changing, Gone):
            for start, end, _ in areas:
                if userfault.is_registered(self.fd, start, end - start):
                    whole.append((start, end, 0))
                else:
                    self._look(start)
        self._whole = Extents(whole)

    def had(self, address: int) -> bool | None:
        """Whether it had an address registered; None when that cannot be told any more. It is
        waited for when that is not known. Raises OSError.
        """
        while not self._is_known(address):
            try:
                self._look(address)
            except Gone:
                self._known[address] = None
            except Changing:
                self._go_on(address)
        return self._known.get(address, True)

    def _is_known(self, address: int) -> bool:
        return address in self._known or bool(self._whole.within(address, address + 1))

    def _look(self, address: int) -> None:
        if self._is_known(address):
            return
        changes = [event for read in self.told for event in read if _is_about(event, address)]
        if not changes:
            self._known[address] = userfault.is_registered(self.fd, address)
            return
        # What it moves away or empties was there. What it unmaps need not have been.
        first = changes[0]
        is_sure = first.kind in (REMAP, REMOVE) and first.start <= address < first.end
        self._known[address] = True if len(changes) == 1 and is_sure else None

    def _go_on(self, address: int) -> None:
        """Let it make the change that it waits with."""
        if self._patience.is_over:
            self._known[address] = None
        elif found := userfault.messages(self.fd):
            self.told.append(found)
        else:
            time.sleep(_PAUSE_S)


class Children:
    """Those whose forks are told of together."""

    def __init__(self) -> None:
        self._all: dict[int, Forked] = {}
        self._patience = Patience()

    def look_at(self, events: Sequence[Message], areas: Extents) -> None:
        """Ask those that events tell of about all places that events are about; new ones about
        areas, too.
        """
        places = dict.fromkeys(place for event in events for place in _places(event))
        for child in self._all.values():
            child.look_at(places)
        for fd in [event.start for event in events if event.kind == FORK]:
            if fd not in self._all:
                self._all[fd] = Forked(fd, self._patience)
                self._all[fd].look_at(places)
                self._all[fd].look_at_areas(list(areas)[:_MOST_AREAS])

    def had(self, fd: int, address: int) -> bool | None:
        """What the child of a descriptor had: see `Forked.had`."""
        return self._all[fd].had(address)

    def told(self, fd: int) -> list[list[Message]]:
        """What the child of a descriptor has told already."""
        return self._all[fd].told


def _places(event: Message) -> Iterable[int]:
    if event.kind != FORK:
        yield event.start
        yield event.end
    if event.kind == REMAP:
        yield event.to


def _is_about(event: Message, address: int) -> bool:
    return any(start <= address < end for start, end in spans(event))
