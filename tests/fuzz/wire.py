"""Targets: input over a socket. NRI's frames and messages, and requests of people."""

from __future__ import annotations

import asyncio
import functools
import json
from typing import TYPE_CHECKING, Any, cast

from protos import nri_pb2
from shim.contract.errors import BadAnnotation, BadRequest
from shim.daemon import control
from shim.daemon.registry import Registry
from shim.daemon.requests import Requests
from shim.nri import service
from shim.nri.events import EVENTS, Plugin
from shim.report.reporter import Reporter
from shim.rpc import mux, ttrpc
from shim.rpc.errors import CallRefused, MuxViolated, TtrpcViolated
from shim.store.store import Store
from shim.workload import annotations as pods
from tests.fuzz.files import place
from tests.fuzz.invariants import Violated, cuts, outcome, refuses_with, same

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from shim.nri.events import Container, Pod


def mux_frames(data: bytes) -> None:
    """Decode NRI's multiplexing: any cut gives the same frames, which encode to the same bytes."""
    stream, pieces = cuts(data)
    with refuses_with():
        whole = outcome(lambda: mux.MuxDecoder().feed(stream), MuxViolated)

        def in_pieces() -> list[tuple[int, bytes]]:
            decoder = mux.MuxDecoder()
            return [frame for piece in pieces for frame in decoder.feed(piece)]

        same(outcome(in_pieces, MuxViolated), whole, "cut differently")
        for conn, message in whole if isinstance(whole, list) else ():
            back = mux.MuxDecoder().feed(mux.encode(conn, message))
            same(b"".join(part for _, part in back), message, "encoded and decoded")


def ttrpc_frames(data: bytes) -> None:
    """Decode ttrpc: any cut gives the same calls, answers and output, and the same bytes."""
    stream, pieces = cuts(data)
    with refuses_with():
        same(_told([stream]), _told(pieces), "cut differently")
        frames = outcome(lambda: ttrpc.FrameDecoder().feed(stream), TtrpcViolated)
        for frame in frames if isinstance(frames, list) else ():
            if isinstance(frame, ttrpc.Frame):
                back = ttrpc.FrameDecoder().feed(ttrpc.encode_frame(frame))
                same(back, [frame], "encoded and decoded")


def _told(pieces: Sequence[bytes]) -> object:
    server, client = ttrpc.TtrpcServer(), ttrpc.Client()
    for _ in range(3):
        client.call("service", "method", b"")
    client.take_output()
    found: list[object] = []
    for side in (server, client):
        for piece in pieces:
            told = outcome(lambda side=side, piece=piece: side.receive(piece), TtrpcViolated)  # type: ignore[misc]
            if not isinstance(told, list):
                found.append(told)  # earlier messages of the same piece are of no use
                break
            found += map(repr, told)  # a refusal is an exception, equal to itself alone
    if TtrpcViolated in found:
        return [TtrpcViolated]
    return [*found, server.take_output(), server.unanswered]


class _Parsing(Plugin):
    """Does the first step of our plugin with a pod."""

    async def create_container(
        self, pod: Pod, container: Container
    ) -> nri_pb2.ContainerAdjustment | None:
        try:
            pods.parse(dict(pod.annotations), container.name)
        except BadAnnotation:
            return None
        return nri_pb2.ContainerAdjustment()


_METHODS = ("Configure", "Synchronize", "UpdateContainer", "StateChange", "Shutdown", *EVENTS)


def nri_calls(data: bytes) -> None:
    """Answer every call of NRI, whatever its content."""
    loop = _loop()
    troubles: list[object] = []
    reports = service.Reports(lambda _: None, lambda *_: None, troubles.append)
    served = service.Service(_Parsing(), service.Handlers(), reports)
    for message in data.split(b"\xff\xfe\xfd")[:4]:
        method = _METHODS[message[0] % len(_METHODS)] if message else "Shutdown"
        call = ttrpc.PendingCall(1, service.SERVICE, method, message[1:])
        with refuses_with(CallRefused):
            answer = loop.run_until_complete(served.handle(call))
            same(type(answer), bytes, "an answer")
    same(troubles, [], "trouble in a handler")


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


@functools.cache
def _requests() -> Requests:
    class _Nobody:
        def __getattr__(self, _: str) -> Any:
            return lambda *_a, **_k: None

    store = Store(str(place() / "store"))
    store.open()
    nobody = cast("Any", _Nobody())
    return Requests(store, nobody, Registry(), nobody, Reporter(), nobody)


def control_requests(data: bytes) -> None:
    """Parse a control request, then run every verb of the daemon on an empty store."""
    with refuses_with(BadRequest):
        control.parse(data)
    with refuses_with():
        answer = json.loads(_loop().run_until_complete(_answered(data)))
        if answer.keys() not in ({"result"}, {"error"}):
            raise Violated(f"no answer: {answer!r:.200}")
        if answer.get("error", {}).get("what") == "the request failed":
            raise Violated(f"a verb failed: {answer['error']['why']}")


def _answered(data: bytes) -> Coroutine[None, None, bytes]:
    async def answered() -> bytes:
        reader = asyncio.StreamReader(limit=control.MAX_REQUEST_BYTES)
        reader.feed_data(data)
        reader.feed_eof()
        handlers = {
            verb: handler for verb, handler in _requests().verbs().items() if verb != "status"
        }
        return await control._answer(reader, handlers, True, 5.0)

    return answered()
