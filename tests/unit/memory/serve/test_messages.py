"""The swap's reading of the messages of its page server."""

import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from shim.contract.errors import Blame, MemoryNotServed
from shim.memory.serve import messages
from shim.restore.memory import PageServer


@pytest.fixture
def ends() -> Iterator[tuple[PageServer, socket.socket]]:
    """Yields the swap's view of a page server, and the server's end."""
    ours, its = socket.socketpair()
    ticket = cast("Any", SimpleNamespace(container="c" * 64, snapshot="5" * 64))
    with ours, its:
        yield PageServer(ticket, 1, ours), its


def until() -> float:
    return time.monotonic() + 5


def test_ready_and_silent_server_counts_as_healthy(
    ends: tuple[PageServer, socket.socket],
) -> None:
    server, its = ends
    server.check_alive()
    its.send(messages.READY)
    server.wait_until_ready(until())
    server.check_alive()


@pytest.mark.parametrize("first", [b"", messages.READY])
@pytest.mark.parametrize("wait", [True, False])
def test_server_reports_the_reason_of_its_end(
    ends: tuple[PageServer, socket.socket], first: bytes, *, wait: bool
) -> None:
    server, its = ends
    its.send(first + messages.DAMAGED + b"shared-7.data, chunk 0: no")
    its.close()
    with pytest.raises(MemoryNotServed, match="chunk 0: no") as failure:
        server.wait_until_ready(until()) if wait else server.check_alive()
    assert failure.value.blame == Blame.CONTENT


@pytest.mark.parametrize("message", [messages.FAILED + b"no memory", b""])
def test_failure_of_the_server_does_not_blame_the_snapshot(
    ends: tuple[PageServer, socket.socket], message: bytes
) -> None:
    server, its = ends
    its.send(message)
    its.close()
    with pytest.raises(MemoryNotServed, match="no memory" if message else "has ended") as failure:
        server.wait_until_ready(until())
    assert failure.value.blame != Blame.CONTENT


def test_silent_server_is_not_awaited(
    ends: tuple[PageServer, socket.socket],
) -> None:
    server, _ = ends
    with pytest.raises(MemoryNotServed, match="does not answer"):
        server.wait_until_ready(time.monotonic())
