import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.rpc.errors import MuxViolated, RpcError
from shim.rpc.mux import FIRST_FRAME_BYTES, HEADER, MAX_FRAME_BYTES, MuxDecoder, encode

frames = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.binary(max_size=80)), max_size=8)


def test_a_frame_is_connection_length_and_content() -> None:
    wire = b"\x00\x00\x00\x02\x00\x00\x00\x03abc"
    assert encode(2, b"abc") == wire
    assert MuxDecoder().feed(wire) == [(2, b"abc")]


def test_an_empty_message_is_a_frame() -> None:
    assert MuxDecoder().feed(encode(7, b"")) == [(7, b"")]


@given(frames, st.data())
def test_any_chunking_gives_the_same_frames(
    sent: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    wire = b"".join(HEADER.pack(conn, len(body)) + body for conn, body in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)))))
    decoder = MuxDecoder()
    got: list[tuple[int, bytes]] = []
    for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        got += decoder.feed(wire[start:end])
    assert got == sent
    assert not decoder.mid_frame


@given(st.lists(st.binary(max_size=40)))
def test_garbage_is_frames_or_a_violation(pieces: list[bytes]) -> None:
    decoder = MuxDecoder()
    try:
        for piece in pieces:
            decoder.feed(piece)
    except RpcError as error:
        assert isinstance(error, MuxViolated)  # noqa: PT017  (raising is only one of both outcomes)


def test_a_frame_over_the_limit_is_refused_at_its_header() -> None:
    MuxDecoder().feed(HEADER.pack(1, MAX_FRAME_BYTES))
    with pytest.raises(MuxViolated):
        MuxDecoder().feed(HEADER.pack(1, MAX_FRAME_BYTES + 1))


def test_stream_that_ends_inside_a_frame_is_recognised() -> None:
    decoder = MuxDecoder()
    decoder.feed(encode(1, b"abc")[:-1])
    assert decoder.mid_frame


@pytest.mark.parametrize("size", [4095, 4096, 4097, 10_000, (4 << 20) + 10])
def test_message_is_split_where_the_readers_of_nri_need_it(size: int) -> None:
    message = bytes(size)
    got = MuxDecoder().feed(encode(1, message))
    assert b"".join(body for _, body in got) == message
    assert len(got[0][1]) == min(size, FIRST_FRAME_BYTES)
    assert len(got) == 1 + (size > FIRST_FRAME_BYTES)
