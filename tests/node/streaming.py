"""Exec and attach over CRI's URL, in the way of the API server's clients.

A WebSocket (RFC 6455) with subprotocol v4.channel.k8s.io: the first byte of a message is its
channel, and channel 3 carries the exit, as JSON.
"""

import base64
import json
import os
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import Final, Self
from urllib.parse import urlsplit

from tests.node.enclosure import Enclosure

STDIN, STDOUT, STDERR, STATUS = range(4)
BINARY, CLOSE, PING = 2, 8, 9
HEAD_WITHIN_S: Final = 10.0


class StreamRefused(Exception):
    """The streaming server did not switch to a WebSocket. The message is the server's answer."""


@dataclass
class Stream:
    """An exec or attach session. `output` grows as the other side writes."""

    _connection: socket.socket
    _pending: bytearray = field(default_factory=bytearray)
    output: dict[int, bytes] = field(default_factory=lambda: {STDOUT: b"", STDERR: b""})
    status: dict[str, object] | None = None
    """The exit, once the session has ended: `status`, and `details` with the exit code of an exec.
    """
    closed: bool = False

    @classmethod
    def open(cls, node: Enclosure, url: str) -> Self:
        """Connect to the node's streaming server. Raises StreamRefused or OSError."""
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        connection = node.connect(parts.hostname, parts.port)
        lines = (
            f"GET {parts.path} HTTP/1.1",
            f"Host: {parts.netloc}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Protocol: v4.channel.k8s.io",
        )
        connection.sendall("\r\n".join((*lines, "", "")).encode())
        stream = cls(connection)
        try:
            stream._handshake()
        except BaseException:
            connection.close()
            raise
        return stream

    def _handshake(self) -> None:
        deadline = time.monotonic() + HEAD_WITHIN_S
        while b"\r\n\r\n" not in self._pending:
            if not self._receive(deadline):
                raise StreamRefused(self._pending.decode(errors="replace"))
        head, _, rest = bytes(self._pending).partition(b"\r\n\r\n")
        if b" 101 " not in head.split(b"\r\n")[0]:
            raise StreamRefused((head + rest).decode(errors="replace"))
        self._pending = bytearray(rest)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def write(self, data: bytes) -> None:
        """Write to the process's standard input."""
        self._send(BINARY, bytes([STDIN]) + data)

    def _send(self, opcode: int, payload: bytes) -> None:
        """Send a frame. A client's frames are masked; the mask may be zeros."""
        size = len(payload)
        length = bytes([0x80 | size]) if size < 126 else struct.pack(">BH", 0x80 | 126, size)
        self._connection.sendall(bytes([0x80 | opcode]) + length + bytes(4) + payload)

    def read_until(self, text: bytes, *, timeout_s: float = 30) -> bytes:
        """Returns standard output so far, as soon as `text` is in it. Raises TimeoutError or
        EOFError.
        """
        deadline = time.monotonic() + timeout_s
        while text not in self.output[STDOUT]:
            if not self._frame(deadline):
                raise EOFError(f"the stream ended with {self.output} and {self.status}")
        return self.output[STDOUT]

    def read_all(self, *, timeout_s: float = 30) -> bytes:
        """Returns standard output until the end of the stream. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while self._frame(deadline):
            pass
        return self.output[STDOUT]

    def _frame(self, deadline: float) -> bool:
        """Take the next frame in; False at the end."""
        while (frame := self._take()) is None:
            if self.closed or not self._receive(deadline):
                return False
        opcode, payload = frame
        if opcode == CLOSE:
            self.closed = True
        elif opcode == BINARY and payload:
            channel, data = payload[0], payload[1:]
            if channel == STATUS:
                self.status = json.loads(data)
            else:
                self.output[channel] += data
        elif opcode == PING:
            self._send(10, payload)
        return not self.closed

    def _take(self) -> tuple[int, bytes] | None:
        """Returns the first whole frame of the received bytes."""
        if len(self._pending) < 2:
            return None
        size, start = self._pending[1] & 0x7F, 2
        if size >= 126:
            shape = ">H" if size == 126 else ">Q"
            start += struct.calcsize(shape)
            if len(self._pending) < start:
                return None
            size = struct.unpack_from(shape, self._pending, 2)[0]
        if len(self._pending) < start + size:
            return None
        opcode, payload = self._pending[0] & 0x0F, bytes(self._pending[start : start + size])
        del self._pending[: start + size]
        return opcode, payload

    def _receive(self, deadline: float) -> bool:
        self._connection.settimeout(max(0.001, deadline - time.monotonic()))
        data = self._connection.recv(65536)
        self._pending += data
        return bool(data)
