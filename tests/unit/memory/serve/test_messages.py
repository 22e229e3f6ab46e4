"""The swap's reading of the messages of its page server."""

import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Final, cast

import pytest

from shim.contract.errors import Blame, MemoryNotServed, ResumeFailed
from shim.memory.serve import messages
from shim.restore.memory import PageServer

CRIUS: Final = "criu: Can't open file own/file on restore: No such file or directory"
KILLED: Final = "criu: 20 killed by signal 9: Killed"


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
    server.check_cause(CRIUS)
    its.send(messages.READY)
    server.wait_until_ready(until())
    server.check_cause(CRIUS)


@pytest.mark.parametrize("first", [b"", messages.READY])
@pytest.mark.parametrize("wait", [True, False])
def test_server_reports_the_reason_of_its_end(
    ends: tuple[PageServer, socket.socket], first: bytes, *, wait: bool
) -> None:
    server, its = ends
    its.send(first + messages.DAMAGED + b"shared-7.data, chunk 0: no")
    its.close()
    with pytest.raises(MemoryNotServed, match="chunk 0: no") as failure:
        server.wait_until_ready(until()) if wait else server.check_cause(CRIUS)
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


@pytest.mark.parametrize("complaint", [b"", messages.FAILED + b"the filler was killed"])
def test_after_the_end_of_criu_the_server_is_not_the_cause(
    ends: tuple[PageServer, socket.socket], complaint: bytes
) -> None:
    """CRIU's connection breaks off because CRIU ended, and so does all else."""
    server, its = ends
    its.send(messages.CUT + complaint)
    its.close()
    server.check_cause(CRIUS)


@pytest.mark.parametrize("complaint", [b"", messages.FAILED + b"no memory"])
def test_server_that_failed_first_is_the_cause_and_criu_follows(
    ends: tuple[PageServer, socket.socket], complaint: bytes
) -> None:
    server, its = ends
    its.send(complaint)
    its.close()
    words = f"{'no memory' if complaint else 'has ended'}, and then {CRIUS}"
    with pytest.raises(MemoryNotServed) as failure:
        server.check_cause(CRIUS)
    assert words in str(failure.value)
    assert failure.value.blame == Blame.OTHER


def test_damage_is_reported_whoever_ended_first(ends: tuple[PageServer, socket.socket]) -> None:
    server, its = ends
    its.send(messages.CUT + messages.DAMAGED + b"chunk 0: no")
    with pytest.raises(MemoryNotServed, match="chunk 0: no") as failure:
        server.check_cause(CRIUS)
    assert failure.value.blame == Blame.CONTENT


def test_criu_that_succeeds_without_an_end_of_its_messages_is_refused_at_once(
    ends: tuple[PageServer, socket.socket],
) -> None:
    server, its = ends
    its.send(messages.CUT)
    with pytest.raises(MemoryNotServed, match="connection ended before"):
        server.wait_until_ready(until())


def test_guard_that_kills_the_processes_first_and_then_the_server_is_waited_for(
    ends: tuple[PageServer, socket.socket],
) -> None:
    server, its = ends
    ending = threading.Timer(0.1, its.close)
    ending.start()
    with pytest.raises(MemoryNotServed, match="has ended, and then criu: 20 killed"):
        server.check_cause(KILLED)
    ending.join()


def test_step_that_fails_because_memory_was_lost_names_the_memory(
    ends: tuple[PageServer, socket.socket],
) -> None:
    server, its = ends
    late = ResumeFailed("the resume call failed", about="c", why="refused", do="")
    with pytest.raises(ResumeFailed), server.first_cause():
        raise late
    its.send(messages.READY + messages.DAMAGED + b"chunk 0: no")
    with pytest.raises(MemoryNotServed, match="chunk 0") as failure, server.first_cause():
        raise late
    assert failure.value.blame == Blame.CONTENT


@pytest.mark.parametrize(
    "said", [b"", messages.READY + messages.FILLED, messages.FAILED + b"no memory"]
)
@pytest.mark.parametrize("read", [True, False])
def test_server_that_ended_before_it_is_let_go_is_the_cause(
    ends: tuple[PageServer, socket.socket], said: bytes, *, read: bool
) -> None:
    server, its = ends
    its.send(said)
    if read:
        its.close()
        with pytest.raises(
            MemoryNotServed, match="no memory" if messages.FAILED in said else "ended"
        ):
            server.keep()
    else:
        server.keep()
        its.close()  # and has not read it: ECONNRESET
        with pytest.raises(
            MemoryNotServed, match="no memory" if messages.FAILED in said else "ended"
        ):
            server.finish(until())
