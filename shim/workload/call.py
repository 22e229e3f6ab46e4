"""Makes an HTTP request or a TCP connection to a workload, from inside its network namespace.

Lean: the swap path makes its resume call with this module. No answer of a workload is trusted: we
read the status line, up to a bound, and nothing else.
"""

from __future__ import annotations

import os
import re
import socket
import time

from shim.kernel.netns import entered
from shim.network.addresses import global_addresses

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])[ \r\n]")
_LOOPBACK = ("127.0.0.1", "::1")


class CallFailed(Exception):
    """The workload did not answer, or answered without success. The message says what happened."""


def http(netns: str, method: str, port: int, target: str, *, until: float) -> int:
    """Send `method target` to `port` of the pod and return the status code, 200 to 399.

    Tries the pod's own addresses first, then loopback. until: deadline on `time.monotonic`. Raises
    CallFailed.
    """
    request = f"{method} {target} HTTP/1.0\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
    with _connected(netns, port, until) as connection:
        try:
            connection.settimeout(_left(until))
            connection.sendall(request.encode())
            line = _status_line(connection, until)
        except OSError as error:
            raise CallFailed(f"{method} :{port}{target}: {error}") from error
    match = _STATUS.match(line)
    if not match:
        raise CallFailed(f"{method} :{port}{target}: no HTTP answer")
    if not 200 <= (status := int(match[1])) < 400:
        raise CallFailed(f"{method} :{port}{target}: status {status}")
    return status


def tcp(netns: str, port: int, *, until: float) -> None:
    """Return when something accepts a connection on `port`. Raises CallFailed."""
    _connected(netns, port, until).close()


def _status_line(connection: socket.socket, until: float) -> bytes:
    line = b""
    while b"\n" not in line and len(line) < 1024:
        connection.settimeout(_left(until))
        data = connection.recv(1024)
        if not data:
            break
        line += data
    return line


def _connected(netns: str, port: int, until: float) -> socket.socket:
    reasons = []
    for address, connection in _sockets(netns):
        try:
            connection.settimeout(_left(until))
            connection.connect((address, port))
        except OSError as error:
            connection.close()
            reasons.append(f"{address}: {error.strerror or error}")
        else:
            return connection
    raise CallFailed(f"nothing answers on port {port} ({'; '.join(reasons)})")


def _sockets(netns: str) -> Iterator[tuple[str, socket.socket]]:
    for address in (*global_addresses(netns), *_LOOPBACK):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with entered(netns):  # a socket stays in the namespace that it was made in
            connection = socket.socket(family, socket.SOCK_STREAM)
        yield address, connection


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError(os.strerror(110))
    return left
