import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from shim.rpc import mux, ttrpc
from shim.rpc.channel import Channel, Connections, Handler, OnFault, PeerLimits
from shim.rpc.errors import (
    CallRefused,
    CallTooLate,
    Code,
    ConnectionLost,
    MuxViolated,
    PeerTooFast,
    TtrpcViolated,
)

OURS, THEIRS = Connections(serve_on=1, call_on=2), Connections(serve_on=2, call_on=1)


async def echo(call: ttrpc.PendingCall) -> bytes:
    return call.payload


def unheard(call: ttrpc.PendingCall, fault: BaseException) -> None:
    raise AssertionError(f"{call} raised {fault!r}")


@asynccontextmanager
async def attached(
    sock: socket.socket,
    ids: Connections,
    handler: Handler,
    *,
    on_fault: OnFault = unheard,
    limits: PeerLimits | None = None,
) -> AsyncIterator[Channel]:
    """Makes a channel over a connected socket, as `connected` does over a path."""
    channel = Channel(ids, handler, on_fault, limits or PeerLimits())
    await asyncio.get_running_loop().create_unix_connection(lambda: channel, sock=sock)
    try:
        yield channel
    finally:
        await channel.ended()


@asynccontextmanager
async def pair(
    handler: Handler = echo, *, on_fault: OnFault = unheard, limits: PeerLimits | None = None
) -> AsyncIterator[tuple[Channel, Channel]]:
    """Yields a channel that serves `handler`, and its peer."""
    ours, theirs = socket.socketpair()
    async with (
        attached(ours, OURS, handler, on_fault=on_fault, limits=limits) as us,
        attached(theirs, THEIRS, echo) as peer,
    ):
        yield us, peer


@asynccontextmanager
async def raw_peer(
    handler: Handler = echo, *, limits: PeerLimits | None = None
) -> AsyncIterator[tuple[Channel, socket.socket]]:
    """Yields a channel, and the bare socket at its other end."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with theirs:
        async with attached(ours, OURS, handler, limits=limits) as us:
            yield us, theirs


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(limited())


def test_both_sides_call_each_other() -> None:
    async def test() -> None:
        async with pair() as (us, peer):
            assert await peer.call("s", "m", b"to us", timeout_s=5) == b"to us"
            assert await us.call("s", "m", b"to them", timeout_s=5) == b"to them"

    run(test)


def test_a_large_message_arrives_whole() -> None:
    async def test() -> None:
        payload = bytes(range(256)) * (15 << 10)
        async with pair() as (_, peer):
            assert await peer.call("s", "m", payload, timeout_s=5) == payload

    run(test)


def test_a_slow_handler_holds_up_no_other_call() -> None:
    release = asyncio.Event()

    async def handler(call: ttrpc.PendingCall) -> bytes:
        if call.method == "slow":
            await release.wait()
        return call.payload

    async def test() -> None:
        async with pair(handler) as (_, peer), asyncio.TaskGroup() as tasks:
            slow = tasks.create_task(peer.call("s", "slow", b"1", timeout_s=5))
            assert await peer.call("s", "fast", b"2", timeout_s=5) == b"2"
            assert not slow.done()
            release.set()
            assert await slow == b"1"

    run(test)


def test_a_refusal_reaches_the_caller_with_its_code() -> None:
    async def handler(_: ttrpc.PendingCall) -> bytes:
        raise CallRefused(Code.NOT_FOUND, "no such thing")

    async def test() -> None:
        async with pair(handler) as (_, peer):
            with pytest.raises(CallRefused, match="NOT_FOUND: no such thing"):
                await peer.call("s", "m", b"", timeout_s=5)

    run(test)


def test_fault_of_a_handler_is_reported_here_and_hidden_from_the_caller() -> None:
    faults: list[BaseException] = []

    async def handler(_: ttrpc.PendingCall) -> bytes:
        raise LookupError("a secret")

    async def test() -> None:
        async with pair(handler, on_fault=lambda _, fault: faults.append(fault)) as (_, peer):
            with pytest.raises(CallRefused, match="INTERNAL: the handler failed"):
                await peer.call("s", "m", b"", timeout_s=5)

    run(test)
    assert [type(fault) for fault in faults] == [LookupError]


def test_late_answer_is_given_up_and_dropped_on_arrival() -> None:
    release = asyncio.Event()

    async def handler(call: ttrpc.PendingCall) -> bytes:
        if call.method == "slow":
            await release.wait()
        return call.method.encode()

    async def test() -> None:
        async with pair(handler) as (_, peer):
            with pytest.raises(CallTooLate):
                await peer.call("s", "slow", b"", timeout_s=0.01)
            release.set()
            assert await peer.call("s", "next", b"", timeout_s=5) == b"next"

    run(test)


def test_timeout_of_a_caller_reaches_the_handler() -> None:
    waits: list[float | None] = []

    async def handler(call: ttrpc.PendingCall) -> bytes:
        waits.append(call.timeout_s)
        return b""

    async def test() -> None:
        async with pair(handler) as (_, peer):
            await peer.call("s", "m", b"", timeout_s=1.5)

    run(test)
    assert waits == [1.5]


def test_calls_end_with_the_connection() -> None:
    async def forever(_: ttrpc.PendingCall) -> bytes:
        await asyncio.Event().wait()
        return b""

    async def test() -> None:
        async with pair(forever) as (us, peer):
            call = asyncio.create_task(peer.call("s", "m", b"", timeout_s=5))
            await asyncio.sleep(0)
            us.close()
            assert "closed by the peer" in str(await peer.wait_closed())
            with pytest.raises(ConnectionLost):
                await call
            with pytest.raises(ConnectionLost):
                await peer.call("s", "m", b"", timeout_s=5)

    run(test)


def test_handlers_are_cancelled_when_the_peer_goes_away() -> None:
    cancelled = asyncio.Event()

    async def forever(_: ttrpc.PendingCall) -> bytes:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return b""

    async def test() -> None:
        async with raw_peer(forever) as (us, theirs):
            client = ttrpc.Client()
            client.call("s", "m", b"")
            theirs.send(b"".join(mux.encode(1, message) for message in client.take_output()))
            await asyncio.sleep(0.01)
            theirs.close()
            await us.wait_closed()
            await cancelled.wait()

    run(test)


@pytest.mark.parametrize(
    ("wire", "error"),
    [
        (mux.HEADER.pack(1, mux.MAX_FRAME_BYTES + 1), MuxViolated),
        (mux.encode(1, ttrpc.FRAME.pack(1 << 31, 1, 1, 0)), TtrpcViolated),
    ],
    ids=["mux", "ttrpc"],
)
def test_a_malformed_frame_closes_our_side(wire: bytes, error: type[Exception]) -> None:
    async def test() -> None:
        async with raw_peer() as (us, theirs):
            theirs.send(wire)
            assert isinstance(await us.wait_closed(), error)
            assert await asyncio.get_running_loop().sock_recv(theirs, 1) == b""

    run(test)


def test_end_inside_a_frame_is_reported() -> None:
    async def test() -> None:
        async with raw_peer() as (us, theirs):
            theirs.send(mux.encode(1, b"abc")[:-1])
            theirs.close()
            assert "in the middle of a frame" in str(await us.wait_closed())

    run(test)


def test_frames_of_other_connections_are_ignored() -> None:
    async def test() -> None:
        async with raw_peer() as (us, theirs):
            theirs.send(mux.encode(99, b"\xff" * 100))
            client = ttrpc.Client()
            client.call("s", "m", b"hi")
            theirs.send(mux.encode(1, client.take_output()[0]))
            ((conn, message),) = mux.MuxDecoder().feed(
                await asyncio.get_running_loop().sock_recv(theirs, 4096)
            )
            assert conn == 1
            assert client.receive(message) == [ttrpc.Answer(1, b"hi")]
            us.close()

    run(test)


def test_a_peer_with_too_many_calls_is_cut_off() -> None:
    async def forever(_: ttrpc.PendingCall) -> bytes:
        await asyncio.Event().wait()
        return b""

    async def test() -> None:
        async with raw_peer(forever, limits=PeerLimits(unanswered_calls=3)) as (us, theirs):
            client = ttrpc.Client()
            for _ in range(4):
                client.call("s", "m", b"")
            theirs.send(b"".join(mux.encode(1, message) for message in client.take_output()))
            assert isinstance(await us.wait_closed(), PeerTooFast)

    run(test)


def test_a_peer_that_does_not_read_is_cut_off() -> None:
    async def much(_: ttrpc.PendingCall) -> bytes:
        return bytes(1 << 20)

    async def test() -> None:
        async with raw_peer(much, limits=PeerLimits(unread_bytes=2 << 20)) as (us, theirs):
            client = ttrpc.Client()
            for _ in range(4):
                client.call("s", "m", b"")
            theirs.send(b"".join(mux.encode(1, message) for message in client.take_output()))
            assert isinstance(await us.wait_closed(), PeerTooFast)

    run(test)
