"""The asyncio shell around mux and ttrpc: one socket on which both sides call each other.

Everything runs on a single event loop, in the socket's own callbacks: incoming bytes are decoded at
once and never wait for a handler, because each call is answered from a task of its own. Where
waiting cannot set a bound, closing does: too many calls at a time, or answers that the peer does
not read, end the connection. Nothing here logs; a connection that has ended says why.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast

from shim.rpc import mux, ttrpc
from shim.rpc.errors import CallRefused, CallTooLate, Code, ConnectionLost, PeerTooFast, RpcError

Handler = Callable[[ttrpc.PendingCall], Coroutine[None, None, bytes]]
"""Answers one call, or raises CallRefused to refuse it. Cancelled when the connection ends."""

OnFault = Callable[[ttrpc.PendingCall, BaseException], None]
"""Called with a handler's exception that is no CallRefused. Its caller gets only `internal`."""


@dataclass(frozen=True, slots=True)
class PeerLimits:
    """Bounds on the calls and bytes that a peer may make us hold before we cut it off."""

    unanswered_calls: int = 64
    unread_bytes: int = 16 << 20


@dataclass(frozen=True, slots=True)
class Connections:
    """Ids of the two multiplexed connections, from our point of view."""

    serve_on: int
    call_on: int


class Channel(asyncio.Protocol):
    """A connection over a socket. `connected` makes a channel, and ends it."""

    def __init__(
        self,
        ids: Connections,
        handler: Handler,
        on_fault: OnFault,
        limits: PeerLimits,
    ) -> None:
        self._ids, self._handler, self._on_fault, self._limits = ids, handler, on_fault, limits
        self._demux = mux.MuxDecoder()
        self._server, self._client = ttrpc.TtrpcServer(), ttrpc.Client()
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._answering: set[asyncio.Task[bytes]] = set()
        self._transport: asyncio.Transport | None = None
        self._closed = asyncio.Event()
        self._reason: RpcError | None = None

    # ---- for the owner ----

    async def call(self, service: str, method: str, payload: bytes, *, timeout_s: float) -> bytes:
        """Call the peer and return its answer.

        Raises CallTooLate after `timeout_s`, CallRefused when the peer answers with an error, and
        ConnectionLost or ProtocolViolated when the connection ends.
        """
        if self._reason:
            raise self._reason
        stream = self._client.call(service, method, payload, timeout_s=timeout_s)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[stream] = answer
        self._flush()
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError as late:
            raise CallTooLate(f"{service}/{method}: no answer within {timeout_s:g} s") from late
        finally:
            self._client.forget(stream)
            del self._waiting[stream]

    async def wait_closed(self) -> RpcError:
        """Wait until the connection has ended. Returns, and does not raise, the error."""
        await self._closed.wait()
        return self._reason or ConnectionLost("closed")

    def close(self, reason: RpcError | None = None) -> None:
        """Close our side at once; unsent bytes are dropped. Closing again does nothing."""
        if self._reason:
            return
        self._reason = reason or ConnectionLost("closed by us")
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(self._reason)
        for task in self._answering:
            task.cancel()
        if self._transport:
            self._transport.abort()
        self._closed.set()

    async def ended(self) -> None:
        """Close, and wait until no handler runs any more."""
        self.close()
        if self._answering:
            await asyncio.wait(self._answering)

    # ---- asyncio.Protocol ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport: the event loop has connected the socket."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Decode and dispatch bytes that the event loop has read from the socket."""
        if self._reason:
            return
        try:
            for conn, message in self._demux.feed(data):
                self._take(conn, message)
        except RpcError as reason:
            self.close(reason)
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """Close the channel: by the peer, unless `close` came first and gave its reason."""
        cut = " in the middle of a frame" if self._demux.mid_frame else ""
        self.close(ConnectionLost(f"closed by the peer{cut}{f': {exc}' if exc else ''}"))

    # ---- inside ----

    def _take(self, conn: int, message: bytes) -> None:
        if conn == self._ids.serve_on:
            for call in self._server.receive(message):
                self._serve(call)
        elif conn == self._ids.call_on:
            for answer in self._client.receive(message):
                self._settle(answer)
        # Any other id belongs to a use of the socket that we do not know: not ours to object to.

    def _settle(self, answer: ttrpc.Answer) -> None:
        waiting = self._waiting.get(answer.stream)
        if waiting is None or waiting.done():
            return
        if isinstance(answer.result, CallRefused):
            waiting.set_exception(answer.result)
        else:
            waiting.set_result(answer.result)

    def _serve(self, call: ttrpc.PendingCall) -> None:
        if self._server.unanswered > self._limits.unanswered_calls:
            raise PeerTooFast(f"more than {self._limits.unanswered_calls} calls wait for an answer")
        task = asyncio.get_running_loop().create_task(self._handler(call))
        self._answering.add(task)
        task.add_done_callback(partial(self._served, call))

    def _served(self, call: ttrpc.PendingCall, task: asyncio.Task[bytes]) -> None:
        self._answering.discard(task)
        fault = asyncio.CancelledError() if task.cancelled() else task.exception()
        if self._reason:
            return  # nobody is left to hear; a fault of a handler that was cut off is no news
        if fault is None:
            fault = self._answer(call, task.result())
        if isinstance(fault, CallRefused):
            self._server.refuse(call.stream, fault)
        elif fault:
            self._server.refuse(call.stream, CallRefused(Code.INTERNAL, "the handler failed"))
            self._on_fault(call, fault)
        self._flush()

    def _answer(self, call: ttrpc.PendingCall, payload: bytes) -> Exception | None:
        try:
            self._server.answer(call.stream, payload)
        except ValueError as too_large:
            return too_large
        return None

    def _flush(self) -> None:
        messages = [(self._ids.serve_on, message) for message in self._server.take_output()]
        messages += [(self._ids.call_on, message) for message in self._client.take_output()]
        if self._reason or self._transport is None:
            return
        for conn, message in messages:
            self._transport.write(mux.encode(conn, message))
        if self._transport.get_write_buffer_size() > self._limits.unread_bytes:
            self.close(PeerTooFast(f"{self._limits.unread_bytes} bytes wait to be read"))


def _ignore(_call: ttrpc.PendingCall, _fault: BaseException) -> None:
    """Ignore faults of handlers: the peer gets them, and an owner's handlers report their own."""


@asynccontextmanager
async def connected(path: str, ids: Connections, handler: Handler) -> AsyncIterator[Channel]:
    """Connect to the unix socket at `path`. On the way out, close it and end all handlers.

    Raises OSError when nobody listens there.
    """
    channel = Channel(ids, handler, _ignore, PeerLimits())
    await asyncio.get_running_loop().create_unix_connection(lambda: channel, path)
    try:
        yield channel
    finally:
        await channel.ended()
