"""Starts forks that do one thing for a page server, with a socket to it. Lean."""

from __future__ import annotations

import os
import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def started(serve: Callable[[socket.socket], None]) -> tuple[int, socket.socket]:
    """Run `serve` in a fork, in its own session. Returns the fork's pid, and our end of a socket.

    serve: is given the other end. The fork exits when `serve` returns or raises: no code of the
    caller runs on in the fork. Call it in a process without threads. Raises OSError.
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
