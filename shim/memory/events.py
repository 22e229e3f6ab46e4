"""In which order events happened that were told at the same time. Pure.

The kernel queues an event after it has unlocked the address space. When two threads change it at
the same time, the second event may be told first. It matters where the kernel gives an address
away again: one thread unmaps an area, another one moves an area to the same place, and their
messages come the other way round. What was moved there would be forgotten.

All events that are under way at the same time are read before any is applied (see
`shim.memory.space`). Then an arrival at a place is preceded by the departure that made the place
free: the two are put in this order where that is what must have happened.
"""

from __future__ import annotations

from shim.kernel.userfault import REMAP, UNMAP, Message

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def ordered(
    read: Sequence[Sequence[Message]], is_mapped: Callable[[int, int], bool]
) -> list[Message]:
    """The events in the order in which they happened, as far as it matters.

    read: what each read brought, in order; several of one read are of several threads. is_mapped:
    whether something is mapped in a range now that all of it has happened.
    """
    placed: list[tuple[int, Message]] = []
    for number, group in enumerate(read):
        for event in group:
            placed.insert(_place(placed, number, event, is_mapped), (number, event))
    return [event for _, event in placed]


def _place(
    placed: Sequence[tuple[int, Message]], number: int, event: Message,
    is_mapped: Callable[[int, int], bool],
) -> int:  # fmt: skip
    """Where to put the next event among those that were read before it: mostly at the end."""
    if event.kind not in (UNMAP, REMAP):
        return len(placed)
    for at, (when, earlier) in enumerate(placed):
        if earlier.kind != REMAP:
            continue
        start = max(event.start, earlier.to)
        end = min(event.end, earlier.to + earlier.end - earlier.start)
        if start >= end:
            continue
        # Told by one read, neither thread could know of the other's. Told later, the event may
        # be of what has arrived; but then nothing is there any more, or something else arrived.
        if when == number or (is_mapped(start, end) and not _arrives(placed[at + 1 :], start, end)):
            return at
    return len(placed)


def _arrives(placed: Sequence[tuple[int, Message]], start: int, end: int) -> bool:
    return any(
        event.kind == REMAP and event.to < end and start < event.to + event.end - event.start
        for _, event in placed
    )
