"""Plants errors in a page server, to prove that the storm finds them."""

from collections.abc import Callable, Sequence
from typing import Any, Final
from unittest import mock

from shim.kernel import userfault
from shim.kernel.userfault import FORK, PAGE, REMAP, REMOVE, UNMAP, Message
from shim.memory.extents import Extents
from shim.memory.serve import space
from shim.memory.serve.events import settle
from shim.memory.serve.space import Space


def _forgetting(kind: int) -> Callable[[], None]:
    """Returns an error: every fourth event of a kind is not applied."""

    def change() -> None:
        count = [0]

        def forgetful(events: Sequence[Message], *rest: Any) -> Any:
            kept = []
            for event in events:
                count[0] += event.kind == kind
                if event.kind != kind or count[0] % 4:
                    kept.append(event)
            return settle(kept, *rest)

        mock.patch.object(space, "settle", forgetful).start()

    return change


def _in_the_wrong_order() -> None:
    """Apply events that are under way together in the opposite order."""

    def swapped(events: Sequence[Message], *rest: Any) -> Any:
        return settle(events[::-1], *rest)

    mock.patch.object(space, "settle", swapped).start()


def move(extents: Extents, start: int, end: int, to: int) -> None:
    """Move the extents at `start` to `to`; extents that were there are gone."""
    moved = extents.take(start, end)
    extents.take(to, to + end - start)
    extents.put((each[0] - start + to, each[1] - start + to, each[2]) for each in moved)


def _as_they_are_read() -> None:
    """Apply events one by one, as if they had happened in the order in which they are read."""

    def naive(events: Sequence[Message], missing: Extents, areas: Extents, *_: Any) -> Any:
        children = []
        for event in events:
            if event.kind == FORK:
                children.append((event.start, missing.copy(), areas.copy()))
            elif event.kind == REMAP:
                move(missing, event.start, event.end, event.to)
            else:
                missing.take(event.start, event.end)
        return children

    mock.patch.object(space, "settle", naive).start()


def _from_the_wrong_place() -> None:
    """Take every 200th piece from the page behind."""
    copy, count = userfault.copy, [0]

    def wrong(fd: int, address: int, source: int, size: int) -> int:
        count[0] += 1
        return copy(fd, address, source + (PAGE if count[0] % 200 == 0 else 0), size)

    userfault.copy = wrong


def _with_zeros() -> None:
    """Make every 200th piece zeros."""
    copy, count = userfault.copy, [0]

    def wrong(fd: int, address: int, source: int, size: int) -> int:
        count[0] += 1
        if count[0] % 200 == 0:
            return userfault.zero(fd, address, size)
        return copy(fd, address, source, size)

    userfault.copy = wrong


def _never() -> None:
    """Every 20th time, withhold a page without content from the thread that waits for it."""
    zero, count = Space._zero, [0]

    def lazy(self: Space, page: int, end: int) -> None:
        count[0] += 1
        if count[0] % 20:
            zero(self, page, end)

    Space._zero = lazy  # type: ignore[method-assign]


ERRORS: Final[dict[str, Callable[[], None]]] = {
    "fork-forgotten": _forgetting(FORK),
    "remap-forgotten": _forgetting(REMAP),
    "unmap-forgotten": _forgetting(UNMAP),
    "remove-forgotten": _forgetting(REMOVE),
    "wrong-order": _in_the_wrong_order,
    "order-of-reading": _as_they_are_read,
    "wrong-place": _from_the_wrong_place,
    "zeros": _with_zeros,
    "unanswered": _never,
}


def plant(name: str) -> None:
    """Plant an error in this process, for good. Nothing for an empty name. Raises KeyError."""
    if name:
        ERRORS[name]()
