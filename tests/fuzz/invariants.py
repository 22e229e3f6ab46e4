"""What must hold for every parser, whatever its input: the same statement for all of them."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MOST_S = 2.0
"""Of the processor's time for one input of some kilobytes: a thousand times what it takes."""


class Violated(AssertionError):
    """A parser did what no input may make it do."""


@contextmanager
def refuses_with(*declared: type[Exception]) -> Iterator[None]:
    """What is refused is refused with one of these, and in bounded time."""
    began = time.process_time()
    try:
        yield
    except Violated:
        raise
    except declared:
        pass
    except Exception as error:
        names = ", ".join(kind.__name__ for kind in declared)
        raise Violated(f"{type(error).__name__} ({error!s:.200}), expected {names}") from error
    if (taken := time.process_time() - began) > MOST_S:
        raise Violated(f"it took {taken:.1f} s")


def same(one: object, other: object, what: str) -> None:
    """Raises Violated when two ways to the same thing differ."""
    if one != other:
        raise Violated(f"{what}: {one!r:.300} and {other!r:.300}")


def cuts(data: bytes) -> tuple[bytes, list[bytes]]:
    """A stream, and the same in pieces: the first byte says how large those are."""
    size, stream = (data[0] % 61) + 1 if data else 1, data[1:]
    return stream, [stream[at : at + size] for at in range(0, len(stream), size)]


def outcome(parse: Callable[[], object], declared: type[Exception]) -> object:
    """The result, or the class with which it was refused."""
    try:
        return parse()
    except declared as error:
        return type(error)
