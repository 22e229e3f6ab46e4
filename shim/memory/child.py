"""A fork that does one thing for a page server, and a socket between the two. Lean."""

from __future__ import annotations

import os
import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def started(serve: Callable[[socket.socket], None]) -> tuple[int, socket.socket]:
    """Have `serve` run in a fork, in a session of its own; its pid, and our end of the socket.

    serve: is given the other end. The fork ends when it returns or raises: nothing of the
    caller's runs on in it. For a process without threads. Raises OSError.
    """
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if not pid:
        try:
            ours.close()
            os.setsid()
            serve(its)
        finally:
            os._exit(0)
    its.close()
    return pid, ours
