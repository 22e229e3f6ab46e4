"""Frames NRI's multiplexing: several logical connections over one socket. Bytes in, frames out.

A frame is a connection id and a length, both 32 bits big endian, and then `length` bytes. There is
no opening, closing or flow control: both sides know the ids beforehand. Source: the NRI project's
pkg/net/multiplex.
"""

import struct

from shim.rpc.errors import MuxViolated

HEADER = struct.Struct(">II")
MAX_FRAME_BYTES = 1 << 24
"""NRI up to 0.6 may send this much in a frame; later versions stay below 4 MiB."""

FIRST_FRAME_BYTES = 4096
"""The most that the first frame of a message may hold, see `encode`."""


class MuxDecoder:
    """Takes the stream in pieces of any size and returns whole frames."""

    def __init__(self) -> None:
        self._pending = bytearray()

    @property
    def mid_frame(self) -> bool:
        """Whether an incomplete frame has begun: an end of stream now would cut the frame."""
        return bool(self._pending)

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Take `data` and return the frames that it completes, as connection id and content.

        Raises MuxViolated for a frame over MAX_FRAME_BYTES; do not use the decoder after that.
        """
        self._pending += data
        frames = []
        start = 0
        while len(self._pending) - start >= HEADER.size:
            conn, length = HEADER.unpack_from(self._pending, start)
            if length > MAX_FRAME_BYTES:
                raise MuxViolated(
                    f"frame of {length} bytes on connection {conn}; {MAX_FRAME_BYTES} is the limit"
                )
            end = start + HEADER.size + length
            if len(self._pending) < end:
                break
            frames.append((conn, bytes(self._pending[start + HEADER.size : end])))
            start = end
        del self._pending[:start]
        return frames


def encode(conn: int, message: bytes) -> bytes:
    """Frame a whole message for connection `conn`.

    A message is cut after its first 4096 bytes. NRI's own reader reads the ttrpc header through a
    buffer of that size, and drops the connection when the frame does not fit; it reads the rest of
    the message into memory of the right size, so the rest must be a single frame again.
    """
    head, rest = message[:FIRST_FRAME_BYTES], message[FIRST_FRAME_BYTES:]
    framed = HEADER.pack(conn, len(head)) + head
    return framed + HEADER.pack(conn, len(rest)) + rest if rest else framed
