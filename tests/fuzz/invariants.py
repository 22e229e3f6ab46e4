"""States the invariants of every parser, whatever its input: the same for all targets."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MOST_S = 2.0
"""Seconds of the processor for an input of some kilobytes: a thousand times the usual."""


class Violated(AssertionError):
    """A parser broke an invariant."""


@contextmanager
def refuses_with(*declared: type[Exception]) -> Iterator[None]:
    """Expect that the code within returns, or refuses with a declared class, in bounded time."""
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
        raise Violated(f"the parser took {taken:.1f} s, more than {MOST_S:g} s")


def same(one: object, other: object, what: str) -> None:
    """Raises Violated when two ways to the same result differ."""
    if one != other:
        raise Violated(f"{what}: {one!r:.300} and {other!r:.300}")


def cuts(data: bytes) -> tuple[bytes, list[bytes]]:
    """Returns a stream, and the same in pieces: the first byte tells the size of the pieces."""
    size, stream = (data[0] % 61) + 1 if data else 1, data[1:]
    return stream, [stream[at : at + size] for at in range(0, len(stream), size)]


def outcome(parse: Callable[[], object], declared: type[Exception]) -> object:
    """Returns the result, or the class with which the parser refused."""
    try:
        return parse()
    except declared as error:
        return type(error)
