"""Starts the page server of a swap, and says whether it is to go on. Lean."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time

from shim.contract.errors import Blame, MemoryNotServed
from shim.kernel import alarm, process
from shim.memory import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shim.contract.ticket import Ticket
    from shim.integrity.check import Unchecked
    from shim.memory.layout import SpaceLayout

SOCKET = "lazy-pages.socket"
"""In CRIU's work directory. Source: CRIU, criu/include/uffd.h."""
_KEEP = b"+"
_ENDS_WITHIN_S = 5.0


class PageServer:
    """The page server of one swap, seen from the swap. Either `keep` or `end` must follow."""

    def __init__(self, pid: int, swap_fd: int) -> None:
        self._pid, self._swap_fd = pid, swap_fd

    def keep(self) -> None:
        """The container is restored: its memory is to be completed whatever happens here.

        Raises BrokenPipeError when the server has ended.
        """
        os.write(self._swap_fd, _KEEP)

    def end(self) -> None:
        """The swap is undone: nobody needs the memory. Returns when the server is gone."""
        os.close(self._swap_fd)
        with alarm.held():
            # It ends by itself, unless it hangs.
            if not process.ends(self._pid, time.monotonic() + _ENDS_WITHIN_S):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)


def start(
    ticket: Ticket, snapshot_dirfd: int, files: Mapping[str, bytes],
    data: Mapping[str, Unchecked], work: str,
) -> PageServer:  # fmt: skip
    """Start a page server that listens in `work`.

    files: the checked small files of the snapshot's memory. data: what is not checked yet of the
    others. Raises MemoryNotServed, OSError.
    """
    try:
        spaces = layout.decode(files, {name: each.size for name, each in data.items()})
    except layout.BadLayout as error:
        failed = MemoryNotServed(
            "cannot serve the memory", container=ticket.container, why=str(error),
            do=f"Run `quickthaw rm {ticket.snapshot[:12]}`; the next pod makes a new one.",
        )  # fmt: skip
        failed.blame = Blame.CONTENT
        raise failed from error
    listener = _listener(work)
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if not pid:
        _become(ticket, snapshot_dirfd, data, spaces, listener, read_fd)
    os.close(read_fd)
    listener.close()
    return PageServer(pid, write_fd)


def _listener(work: str) -> socket.socket:
    """A socket in a directory whose path may be too long for an address."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dirfd = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(SOCKET, dir_fd=dirfd)
        listener.bind(f"/proc/self/fd/{dirfd}/{SOCKET}")
        listener.listen(1)
    finally:
        os.close(dirfd)
    return listener


def _become(
    ticket: Ticket, snapshot_dirfd: int, data: Mapping[str, Unchecked],
    spaces: Sequence[SpaceLayout], listener: socket.socket, swap_fd: int,
) -> None:  # fmt: skip
    """The child's part: the page server. Nothing of the caller's may run on in it."""
    try:
        os.setsid()
        alarm.cancel()
        _let_go(snapshot_dirfd, listener.fileno(), swap_fd)
        # Only here: the swap needs no threads, and does not wait for what is imported.
        from shim.memory.run import serve

        serve(ticket, snapshot_dirfd, data, spaces, listener, swap_fd)
    finally:
        os._exit(0)


def _let_go(*kept: int) -> None:
    """The pod's log, and whatever else is the caller's: who waits for their end must not wait."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))
