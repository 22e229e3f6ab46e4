"""Encodes and decodes ttrpc: unary calls as frames on a connection. No I/O.

A frame is a length and a stream id (32 bits big endian), a type, flags (8 bits each) and the
message. A call is a request frame with a new odd stream id and a response frame with the same id.
Streaming (data frames) is not supported: a peer that tries to stream gets an error. Source: the
ttrpc project's PROTOCOL.md.

`TtrpcServer` and `Client` are the two sides of a connection. Each collects messages to be sent;
`take_output` hands them over message by message, because NRI's multiplexing frames whole messages.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from google.protobuf.message import DecodeError

from protos import ttrpc_pb2
from shim.rpc.errors import CallRefused, Code, TtrpcViolated

FRAME = struct.Struct(">IIBB")
MAX_MESSAGE_BYTES = 4 << 20
REMOTE_OPEN = 0x02
"""Flag of a request whose caller has more to send: a stream."""

_NANOSECONDS = 1_000_000_000
_FIRST_BYTE_RESERVED = 1 << 24
_LAST_STREAM = (1 << 32) - 1
_STATUS_TEXT = 4096


class FrameType(IntEnum):
    """The types of this version of the protocol. Frames of other types are skipped."""

    REQUEST = 1
    RESPONSE = 2
    DATA = 3


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame as it was on the wire."""

    stream: int
    type: int
    flags: int
    message: bytes


@dataclass(frozen=True, slots=True)
class Oversized:
    """A frame over the limit. Its message was skipped; the connection is still in step."""

    stream: int
    type: int
    length: int


@dataclass(frozen=True, slots=True)
class PendingCall:
    """A call that waits for its answer."""

    stream: int
    service: str
    method: str
    payload: bytes
    timeout_s: float | None = None
    metadata: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a call of ours."""

    stream: int
    result: bytes | CallRefused


def encode_frame(frame: Frame) -> bytes:
    """Returns a frame's bytes. Raises ValueError over MAX_MESSAGE_BYTES: our own mistake."""
    if len(frame.message) > MAX_MESSAGE_BYTES:
        raise ValueError(f"message of {len(frame.message)} bytes; {MAX_MESSAGE_BYTES} is the limit")
    return FRAME.pack(len(frame.message), frame.stream, frame.type, frame.flags) + frame.message


class FrameDecoder:
    """Takes the stream in pieces of any size and returns whole frames."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self._skip_bytes = 0

    def feed(self, data: bytes) -> list[Frame | Oversized]:
        """Take `data` and return the frames that it completes.

        Raises TtrpcViolated when a length has its reserved first byte set; do not use the decoder
        after that.
        """
        self._pending += data
        frames: list[Frame | Oversized] = []
        while (frame := self._next()) is not None:
            frames.append(frame)
        return frames

    def _next(self) -> Frame | Oversized | None:
        self._skip()
        if self._skip_bytes or len(self._pending) < FRAME.size:
            return None
        length, stream, kind, flags = FRAME.unpack_from(self._pending)
        if length >= _FIRST_BYTE_RESERVED:
            raise TtrpcViolated(f"frame of {length} bytes on stream {stream}")
        if length > MAX_MESSAGE_BYTES:
            self._skip_bytes = FRAME.size + length
            self._skip()
            return Oversized(stream, kind, length)
        end = FRAME.size + length
        if len(self._pending) < end:
            return None
        message = bytes(self._pending[FRAME.size : end])
        del self._pending[:end]
        return Frame(stream, kind, flags, message)

    def _skip(self) -> None:
        skipped = min(self._skip_bytes, len(self._pending))
        del self._pending[:skipped]
        self._skip_bytes -= skipped


class _Side:
    """The common part of both sides: a decoder, and messages that wait to be sent."""

    def __init__(self) -> None:
        self._decoder = FrameDecoder()
        self._output: list[bytes] = []

    def take_output(self) -> list[bytes]:
        """Returns whole messages to send, in order. The caller owns them from here on."""
        output, self._output = self._output, []
        return output

    def _send(self, stream: int, kind: FrameType, message: bytes) -> None:
        self._output.append(encode_frame(Frame(stream, kind, 0, message)))


class TtrpcServer(_Side):
    """The side that answers calls."""

    def __init__(self) -> None:
        super().__init__()
        self._open: set[int] = set()
        self._last_stream = 0

    @property
    def unanswered(self) -> int:
        """Returns the number of calls that `receive` has returned and nobody has answered yet."""
        return len(self._open)

    def receive(self, data: bytes) -> list[PendingCall]:
        """Take bytes and return the calls that they complete.

        An error of a single call is answered here. Raises TtrpcViolated when the stream is out of
        step.
        """
        calls = []
        for frame in self._decoder.feed(data):
            try:
                call = self._call(frame)
            except CallRefused as refusal:
                self._refuse(frame.stream, refusal)
                continue
            if call:
                self._open.add(call.stream)
                calls.append(call)
        return calls

    def answer(self, stream: int, payload: bytes) -> None:
        """Answer a call with its result. Raises KeyError when the call was answered before."""
        message = ttrpc_pb2.Response(payload=payload).SerializeToString()
        if len(message) > MAX_MESSAGE_BYTES:
            raise ValueError(f"answer of {len(message)} bytes; {MAX_MESSAGE_BYTES} is the limit")
        self._open.remove(stream)
        self._send(stream, FrameType.RESPONSE, message)

    def refuse(self, stream: int, refusal: CallRefused) -> None:
        """Answer a call with an error. Raises KeyError when the call was answered before."""
        self._open.remove(stream)
        self._refuse(stream, refusal)

    def _refuse(self, stream: int, refusal: CallRefused) -> None:
        status = ttrpc_pb2.Status(code=int(refusal.code), message=refusal.message[:_STATUS_TEXT])
        message = ttrpc_pb2.Response(status=status).SerializeToString()
        self._send(stream, FrameType.RESPONSE, message)

    def _call(self, frame: Frame | Oversized) -> PendingCall | None:
        if isinstance(frame, Oversized):
            why = f"message of {frame.length} bytes; {MAX_MESSAGE_BYTES} is the limit"
            raise CallRefused(Code.RESOURCE_EXHAUSTED, why)
        if frame.type == FrameType.DATA:
            raise CallRefused(Code.INVALID_ARGUMENT, "no stream is open under this id")
        if frame.type != FrameType.REQUEST:
            return None
        if frame.stream % 2 == 0 or frame.stream <= self._last_stream:
            raise CallRefused(Code.INVALID_ARGUMENT, "stream ids must be odd and ascending")
        self._last_stream = frame.stream
        if frame.flags & REMOTE_OPEN:
            raise CallRefused(Code.UNIMPLEMENTED, "streams are not served")
        return _parse_call(frame)


def _parse_call(frame: Frame) -> PendingCall:
    try:
        request = ttrpc_pb2.Request.FromString(frame.message)
    except DecodeError as error:
        raise CallRefused(Code.INVALID_ARGUMENT, f"no request: {error}") from error
    timeout_s = request.timeout_nano / _NANOSECONDS if request.timeout_nano > 0 else None
    metadata = tuple((pair.key, pair.value) for pair in request.metadata)
    return PendingCall(
        frame.stream, request.service, request.method, request.payload, timeout_s, metadata
    )


class Client(_Side):
    """The side that makes calls."""

    def __init__(self) -> None:
        super().__init__()
        self._open: set[int] = set()
        self._next_stream = 1

    def call(
        self,
        service: str,
        method: str,
        payload: bytes,
        *,
        timeout_s: float | None = None,
        metadata: Iterable[tuple[str, str]] = (),
    ) -> int:
        """Send a call and return its stream id, which the answer will have.

        Raises ValueError when the payload is too large, and TtrpcViolated when the connection has
        used up its stream ids.
        """
        stream = self._next_stream
        if stream > _LAST_STREAM:
            raise TtrpcViolated("no stream id is left on this connection")
        request = ttrpc_pb2.Request(service=service, method=method, payload=payload)
        if timeout_s is not None:
            request.timeout_nano = max(1, round(timeout_s * _NANOSECONDS))
        request.metadata.extend(ttrpc_pb2.KeyValue(key=key, value=value) for key, value in metadata)
        self._send(stream, FrameType.REQUEST, request.SerializeToString())
        self._next_stream += 2
        self._open.add(stream)
        return stream

    def forget(self, stream: int) -> None:
        """Stop waiting for the answer on `stream`: a later answer is dropped."""
        self._open.discard(stream)

    def receive(self, data: bytes) -> list[Answer]:
        """Take bytes and return the answers that they complete.

        An answer that came too late, for which nobody waits, is dropped. Raises TtrpcViolated when
        the stream is out of step, or when an answer is not a response.
        """
        answers = []
        for frame in self._decoder.feed(data):
            if frame.type in (FrameType.RESPONSE, FrameType.DATA) and frame.stream in self._open:
                answers.append(Answer(frame.stream, _parse_result(frame)))
                self._open.discard(frame.stream)
        return answers


def _parse_result(frame: Frame | Oversized) -> bytes | CallRefused:
    if isinstance(frame, Oversized):
        why = f"answer of {frame.length} bytes; {MAX_MESSAGE_BYTES} is the limit"
        return CallRefused(Code.RESOURCE_EXHAUSTED, why)
    if frame.type == FrameType.DATA:
        raise TtrpcViolated(f"stream data in answer to the unary call {frame.stream}")
    try:
        response = ttrpc_pb2.Response.FromString(frame.message)
    except DecodeError as error:
        raise TtrpcViolated(f"no response: {error}") from error
    if response.status.code:
        return CallRefused(response.status.code, response.status.message)
    return response.payload
