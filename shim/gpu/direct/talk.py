"""JSON objects between a way and its carrier, of any size: one message of a SEQPACKET socket has at
most what its buffer takes, and digests of 30 GiB are more. Those travel in a file of memory. Lean.
"""

from __future__ import annotations

import json
import os
import socket

from shim.contract import jsontext

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_IN_MESSAGE_BYTES = 64 << 10
_MOST_BYTES = 256 << 20
_IN_FILE = b"file"


def send(to: socket.socket, what: Mapping[str, object]) -> None:
    """Send one object. Raises OSError."""
    data = json.dumps(what).encode()
    if len(data) <= _IN_MESSAGE_BYTES:
        to.send(data)
        return
    with os.fdopen(os.memfd_create("quickthaw-request"), "w+b") as file:
        file.write(data)
        file.flush()
        socket.send_fds(to, [_IN_FILE], [file.fileno()])


def receive(source: socket.socket) -> dict[str, Any] | None:
    """Returns the next object, None when the other end is closed. Raises OSError, ValueError."""
    data, fds, _, _ = socket.recv_fds(source, _IN_MESSAGE_BYTES, 1)
    if fds:
        with os.fdopen(fds[0], "rb") as file:
            data = os.pread(file.fileno(), _MOST_BYTES, 0)
    if not data:
        return None
    found: dict[str, Any] = jsontext.parse(data)
    return found
