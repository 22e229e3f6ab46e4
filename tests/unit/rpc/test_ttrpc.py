import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import ttrpc_pb2
from shim.rpc.errors import CallRefused, Code, RpcError, TtrpcViolated
from shim.rpc.ttrpc import (
    FRAME,
    MAX_MESSAGE_BYTES,
    REMOTE_OPEN,
    Answer,
    Client,
    Frame,
    FrameDecoder,
    FrameType,
    Oversized,
    PendingCall,
    TtrpcServer,
    encode_frame,
)

REQUEST = bytes.fromhex(
    "00000012 00000001 01 00"  # length, stream, type, flags
    "0a 03 732e53"  # service "s.S"
    "12 01 4d"  # method "M"
    "1a 02 6869"  # payload "hi"
    "20 80cab5ee01"  # timeout_nano 500_000_000
)
RESPONSE = bytes.fromhex("00000004 00000001 02 00 12 02 6f6b")
REFUSAL = bytes.fromhex("00000008 00000001 02 00 0a 06 08 0c 12 02 6e6f")

frames = st.builds(
    Frame,
    st.integers(0, 2**32 - 1),
    st.integers(0, 255),
    st.integers(0, 255),
    st.binary(max_size=60),
)


def one_call(server: TtrpcServer, wire: bytes = REQUEST) -> PendingCall:
    (call,) = server.receive(wire)
    return call


def refusal_in(server: TtrpcServer) -> tuple[int, CallRefused]:
    (message,) = server.take_output()
    (frame,) = FrameDecoder().feed(message)
    assert isinstance(frame, Frame)
    status = ttrpc_pb2.Response.FromString(frame.message).status
    return frame.stream, CallRefused(status.code, status.message)


def request(stream: int, *, flags: int = 0, kind: int = FrameType.REQUEST) -> bytes:
    return encode_frame(
        Frame(stream, kind, flags, ttrpc_pb2.Request(method="M").SerializeToString())
    )


def test_a_call_is_these_bytes() -> None:
    client = Client()
    assert client.call("s.S", "M", b"hi", timeout_s=0.5) == 1
    assert client.take_output() == [REQUEST]
    assert client.take_output() == []


def test_these_bytes_are_a_call() -> None:
    assert one_call(TtrpcServer()) == PendingCall(1, "s.S", "M", b"hi", timeout_s=0.5)


def test_an_answer_is_these_bytes() -> None:
    server = TtrpcServer()
    server.answer(one_call(server).stream, b"ok")
    assert server.take_output() == [RESPONSE]


def test_a_refusal_is_these_bytes() -> None:
    server = TtrpcServer()
    server.refuse(one_call(server).stream, CallRefused(Code.UNIMPLEMENTED, "no"))
    assert server.take_output() == [REFUSAL]


def test_a_client_reads_answers_and_refusals() -> None:
    client = Client()
    client.call("s.S", "M", b"")
    assert client.receive(RESPONSE) == [Answer(1, b"ok")]
    client = Client()
    client.call("s.S", "M", b"")
    ((_, result),) = [(answer.stream, answer.result) for answer in client.receive(REFUSAL)]
    assert isinstance(result, CallRefused)
    assert (result.code, result.message) == (Code.UNIMPLEMENTED, "no")


def test_a_call_without_a_timeout_has_none() -> None:
    assert one_call(TtrpcServer(), request(1)).timeout_s is None


def test_metadata_arrives_in_order_with_repeated_keys() -> None:
    client, server = Client(), TtrpcServer()
    client.call("s", "m", b"", metadata=[("k", "1"), ("k", "2"), ("a", "")])
    call = one_call(server, b"".join(client.take_output()))
    assert call.metadata == (("k", "1"), ("k", "2"), ("a", ""))


def test_a_code_that_grpc_does_not_know_is_kept() -> None:
    assert CallRefused(999, "x").code == 999


@given(st.lists(frames, max_size=6), st.data())
def test_any_chunking_gives_the_same_frames(sent: list[Frame], data: st.DataObject) -> None:
    wire = b"".join(encode_frame(frame) for frame in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)))))
    decoder = FrameDecoder()
    got: list[Frame | Oversized] = []
    for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        got += decoder.feed(wire[start:end])
    assert got == sent


@given(st.lists(st.binary(max_size=60)))
def test_garbage_is_a_call_an_answer_or_a_violation(pieces: list[bytes]) -> None:
    for side in (TtrpcServer(), Client()):
        try:
            for piece in pieces:
                side.receive(piece)
        except RpcError as error:
            assert isinstance(error, TtrpcViolated)  # noqa: PT017  (only one of both outcomes)


@given(st.lists(frames))
def test_well_formed_frames_with_any_content_never_break_a_server(sent: list[Frame]) -> None:
    server = TtrpcServer()
    calls = [call for frame in sent for call in server.receive(encode_frame(frame))]
    assert server.unanswered == len(calls)


def test_a_length_with_its_reserved_byte_set_is_a_violation() -> None:
    with pytest.raises(TtrpcViolated):
        FrameDecoder().feed(FRAME.pack(1 << 24, 1, 1, 0))


def test_an_oversized_request_is_refused_and_the_stream_stays_in_step() -> None:
    server = TtrpcServer()
    oversized = FRAME.pack(MAX_MESSAGE_BYTES + 1, 1, FrameType.REQUEST, 0)
    assert server.receive(oversized + bytes(1000)) == []
    stream, refusal = refusal_in(server)
    assert (stream, refusal.code) == (1, Code.RESOURCE_EXHAUSTED)
    assert [
        call.stream for call in server.receive(bytes(MAX_MESSAGE_BYTES - 999) + request(3))
    ] == [3]


def test_an_oversized_message_of_ours_is_not_sent() -> None:
    client, server = Client(), TtrpcServer()
    with pytest.raises(ValueError, match="is the limit"):
        client.call("s", "m", bytes(MAX_MESSAGE_BYTES))
    call = one_call(server)
    with pytest.raises(ValueError, match="is the limit"):
        server.answer(call.stream, bytes(MAX_MESSAGE_BYTES))
    server.answer(call.stream, b"")


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        (request(2), Code.INVALID_ARGUMENT),
        (request(1, kind=FrameType.DATA), Code.INVALID_ARGUMENT),
        (request(1, flags=REMOTE_OPEN), Code.UNIMPLEMENTED),
        (encode_frame(Frame(1, FrameType.REQUEST, 0, b"\xff")), Code.INVALID_ARGUMENT),
    ],
    ids=["even stream", "data", "streaming", "no protobuf"],
)
def test_a_wrong_request_is_refused_alone(wire: bytes, code: Code) -> None:
    server = TtrpcServer()
    assert server.receive(wire) == []
    assert refusal_in(server)[1].code == code
    assert one_call(server, request(5)).stream == 5


def test_a_stream_id_cannot_come_twice() -> None:
    server = TtrpcServer()
    one_call(server)
    assert server.receive(REQUEST) == []
    assert refusal_in(server)[1].code == Code.INVALID_ARGUMENT


@pytest.mark.parametrize("kind", [0, 2, 4, 255])
def test_frames_of_other_types_are_skipped_by_a_server(kind: int) -> None:
    server = TtrpcServer()
    assert server.receive(request(1, kind=kind)) == []
    assert server.take_output() == []


def test_an_answer_that_nobody_waits_for_is_dropped() -> None:
    client = Client()
    client.forget(client.call("s", "m", b""))
    assert client.receive(RESPONSE) == []


def test_the_second_answer_to_a_call_is_dropped() -> None:
    client = Client()
    client.call("s", "m", b"")
    assert len(client.receive(RESPONSE + RESPONSE)) == 1


@pytest.mark.parametrize(
    "wire",
    [
        encode_frame(Frame(1, FrameType.DATA, 0, b"x")),
        encode_frame(Frame(1, FrameType.RESPONSE, 0, b"\xff")),
    ],
    ids=["data", "no protobuf"],
)
def test_malformed_answer_is_a_violation(wire: bytes) -> None:
    client = Client()
    client.call("s", "m", b"")
    with pytest.raises(TtrpcViolated):
        client.receive(wire)


def test_an_oversized_answer_refuses_its_call() -> None:
    client = Client()
    client.call("s", "m", b"")
    (answer,) = client.receive(FRAME.pack(MAX_MESSAGE_BYTES + 1, 1, FrameType.RESPONSE, 0))
    assert isinstance(answer.result, CallRefused)
    assert answer.result.code == Code.RESOURCE_EXHAUSTED
