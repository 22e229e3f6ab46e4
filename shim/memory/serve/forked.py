"""Finds which addresses a child had registered at the moment of its fork.

The answer tells where the fork belongs among changes of its parent that were reported at about the
same time. The child runs as soon as its fork event was read. So we ask at once about all areas that
its parent is known to have, because the addresses that matter are reported later. Changes that the
child made before we asked are read, until the child stands still for the question; at other
addresses the child has what it had at its fork.
"""

from __future__ import annotations

import contextlib
import time

from shim.kernel import userfault
from shim.kernel.userfault import FORK, REMAP, REMOVE, Changing, Gone
from shim.memory.extents import Extents
from shim.memory.serve.events import spans

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from shim.kernel.userfault import Message
    from shim.memory.extents import Extent

_MOST_AREAS = 1000
"""Areas that we ask about: takes a millisecond or two."""
_PATIENCE_S = 0.2
"""How long we wait for all children that were forked together; page faults wait meanwhile, too. A
child may have lost its processor in the middle of a change, for several time slices of others."""
_PAUSE_S = 0.0001


class Patience:
    """How long we wait for children that do not stand still, counted from the first question."""

    def __init__(self) -> None:
        self._until = 0.0

    @property
    def is_over(self) -> bool:
        """Whether the time is over: do not wait for the answers that are still missing."""
        now = time.monotonic()
        self._until = self._until or now + _PATIENCE_S
        return now > self._until


class Forked:
    """Asks a child about its registered addresses. fd: its userfaultfd, which the caller owns.

    told: the events read from the child, turn by turn, which must be applied before all others.
    """

    def __init__(self, fd: int, patience: Patience) -> None:
        self.fd, self._patience = fd, patience
        self.told: list[list[Message]] = []
        self._known: dict[int, bool | None] = {}
        self._whole = Extents()

    def look_at(self, addresses: Iterable[int]) -> None:
        """Ask about these addresses now, as long as the child stands still. Raises OSError."""
        with contextlib.suppress(Changing, Gone):
            for address in addresses:
                self._look(address)

    def look_at_areas(self, areas: Iterable[Extent]) -> None:
        """Ask about areas of the child, before any event was read from it. Raises OSError."""
        whole = []
        with contextlib.suppress(Changing, Gone):
            for start, end, _ in areas:
                if userfault.is_registered(self.fd, start, end - start):
                    whole.append((start, end, 0))
                else:
                    self._look(start)
        self._whole = Extents(whole)

    def had(self, address: int) -> bool | None:
        """Whether the child had an address registered; None when that can no longer be found out.

        Waits for the child as long as the answer is open. Raises OSError.
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
        # A range that the child moves or empties was there. A range that it unmaps need not have
        # been.
        first = changes[0]
        is_sure = first.kind in (REMAP, REMOVE) and first.start <= address < first.end
        self._known[address] = True if len(changes) == 1 and is_sure else None

    def _go_on(self, address: int) -> None:
        """Let the child finish the change under way, by reading its event."""
        if self._patience.is_over:
            self._known[address] = None
        elif found := userfault.messages(self.fd):
            self.told.append(found)
        else:
            time.sleep(_PAUSE_S)


class Children:
    """Asks the children whose forks were reported together."""

    def __init__(self) -> None:
        self._all: dict[int, Forked] = {}
        self._patience = Patience()

    def look_at(self, events: Sequence[Message], areas: Extents) -> None:
        """Ask the children about all addresses of the events; new children about areas, too."""
        places = dict.fromkeys(place for event in events for place in _places(event))
        for child in self._all.values():
            child.look_at(places)
        for fd in [event.start for event in events if event.kind == FORK]:
            if fd not in self._all:
                self._all[fd] = Forked(fd, self._patience)
                self._all[fd].look_at(places)
                self._all[fd].look_at_areas(list(areas)[:_MOST_AREAS])

    def had(self, fd: int, address: int) -> bool | None:
        """Whether the child behind a descriptor had an address registered: see `Forked.had`."""
        return self._all[fd].had(address)

    def told(self, fd: int) -> list[list[Message]]:
        """Returns the events that were read from the child behind a descriptor."""
        return self._all[fd].told


def _places(event: Message) -> Iterable[int]:
    if event.kind != FORK:
        yield event.start
        yield event.end
    if event.kind == REMAP:
        yield event.to


def _is_about(event: Message, address: int) -> bool:
    return any(start <= address < end for start, end in spans(event))
