"""The messages between the host and the library in the container: docs/formats.md. Lean.

One message of a SEQPACKET socket each, little-endian. The container writes these
messages: everything is parsed with limits, and descriptors have an owner before anything is read.
"""

from __future__ import annotations

import array
import os
import socket
import struct

from shim.contract.paths import GPU_SOCKET

MAGIC = 0x31475451
VERSION = 1
BATCH = 64
"""Descriptors in one message."""
THREAD = "quickthaw-gpu"
WAKE = 61
"""SIGRTMAX - 3: sent to the library's thread alone, which waits for it and nothing else."""
SOCKET = GPU_SOCKET
"""In the control directory."""

HELLO, CLOSE, CLOSED, BUSY, LEND, PIECES, NEXT, LENT = range(1, 9)
DROP, DROPPED, FILL, FILLED, OPEN, OPENED, FAILED, STATE = range(9, 17)

SEEN = (
    "peer access", "imported handles", "open IPC handles", "shared IPC handles", "managed memory",
    "multicast", "external memory", "graphics", "exported handles", "memory that stays",
)  # fmt: skip
"""Calls that the library has seen, by bit."""
IMPORTED = SEEN[1]

_HEAD = struct.Struct("<IHHII")
_HELLO = struct.Struct("<IIIIQQQII200s")
_LENT = struct.Struct("<QQ16s")
_MOST_BYTES = 1 << 13
_RIGHTS_BYTES = socket.CMSG_SPACE(4 * BATCH)


class Malformed(Exception):
    """The bytes are no message of this protocol."""


class WireMessage:
    """kind, count, value: of the head. body: what follows. fds: ours to close."""

    __slots__ = ("body", "count", "fds", "kind", "value")

    def __init__(self, kind: int, count: int, value: int, body: bytes, fds: list[int]) -> None:
        self.kind, self.count, self.value, self.body, self.fds = kind, count, value, body, fds

    def close(self) -> None:
        """Close the descriptors that nobody took."""
        while self.fds:
            os.close(self.fds.pop())

    def words(self) -> str:
        """The text of BUSY and FAILED."""
        return printable(self.body)


class Hello:
    """The library's account of its process.

    pid: in the process's own namespace. closed: the gate. away: pieces that are not there.
    pieces, octets, largest: of what moves. seen: words of SEEN. said: its last complaint.
    """

    __slots__ = ("away", "capturing", "closed", "largest", "mappings", "octets", "pid", "pieces",
                 "said", "seen")  # fmt: skip

    def __init__(self, body: bytes) -> None:
        if len(body) != _HELLO.size:
            raise Malformed(f"a hello of {len(body)} octets")
        (self.pid, closed, self.away, self.capturing, self.pieces, self.octets, self.largest,
         bits, self.mappings, said) = _HELLO.unpack(body)  # fmt: skip
        self.closed = bool(closed)
        self.seen = [word for bit, word in enumerate(SEEN) if bits >> bit & 1]
        if bits >> len(SEEN):
            self.seen.append("something that this quickthaw does not know")
        self.said = printable(said)


class Lent:
    """A piece of device memory: its number in the process, its size, its GPU, a descriptor."""

    __slots__ = ("fd", "number", "octets", "uuid")

    def __init__(self, number: int, octets: int, uuid: bytes, fd: int) -> None:
        self.number, self.octets, self.uuid, self.fd = number, octets, uuid, fd


def printable(text: bytes) -> str:
    """Up to the first zero, without anything that a terminal obeys."""
    whole = text.split(b"\0")[0].decode(errors="replace")
    return "".join(letter if letter.isprintable() else "?" for letter in whole)


def send(
    to: socket.socket,
    kind: int,
    *,
    count: int = 0,
    value: int = 0,
    body: bytes = b"",
    fds: list[int] | None = None,
) -> None:
    """Raises OSError; TimeoutError as the socket's time-out says."""
    head = _HEAD.pack(MAGIC, VERSION, kind, count, value)
    if fds:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        to.sendmsg([head + body], rights)
    else:
        to.send(head + body)


def receive(source: socket.socket) -> WireMessage:
    """Raises Malformed, EOFError when the library has hung up, OSError, TimeoutError."""
    data, ancillary, flags, _ = source.recvmsg(_MOST_BYTES, _RIGHTS_BYTES, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, rights in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(rights[: len(rights) // 4 * 4])
    owned = fds.tolist()
    try:
        if not data:
            raise EOFError("the library has hung up")
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(data) < _HEAD.size:
            raise Malformed(f"a message of {len(data)} octets, or cut off")
        magic, version, kind, count, value = _HEAD.unpack_from(data)
        if (magic, version) != (MAGIC, VERSION):
            raise Malformed(f"magic {magic:#x}, version {version}")
        message = WireMessage(kind, count, value, data[_HEAD.size :], owned)
        owned = []
        return message
    finally:
        for fd in owned:
            os.close(fd)


def lent(message: WireMessage) -> list[Lent]:
    """The pieces of a PIECES message; the descriptors are theirs. Raises Malformed."""
    count = len(message.fds)
    if not 0 < count <= BATCH or count != message.count or len(message.body) != count * _LENT.size:
        raise Malformed(f"{message.count} pieces, {count} descriptors, {len(message.body)} octets")
    found = []
    for index, (number, octets, uuid) in enumerate(_LENT.iter_unpack(message.body)):
        if not number or not octets or octets % (2 << 20) or octets > 1 << 46:
            raise Malformed(f"a piece number {number} of {octets} octets")
        found.append(Lent(number, octets, uuid, message.fds[index]))
    message.fds = []
    return found


def numbers(of: list[int]) -> bytes:
    """The body of FILL."""
    return struct.pack(f"<{len(of)}Q", *of)
