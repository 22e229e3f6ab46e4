"""Reads CRIU's messages to a page server: each process's pid and userfaultfd, then the end.

CRIU's processes share the connection: 4 bytes with the pid (negative for a zombie, which has no
memory), a byte with the descriptor. Source: CRIU, criu/uffd.c and compel's scm.
"""

from __future__ import annotations

import array
import socket
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_PID = struct.Struct("<i")
_FINISHED = 0x52535446
_MAX_FDS = 4


class NotCriu(Exception):
    """The peer sent bytes or descriptors that CRIU does not send."""


class LazySocket:
    """A connection of CRIU. finished: CRIU has restored everything and lets the processes run.

    closed: the connection has ended. The main process of CRIU holds it until `finished`, so without
    `finished` CRIU has ended before it was done. CRIU can end anywhere in a message, when it kills
    its processes after an error: that is no error of the message.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection, self._pid_bytes = connection, b""
        self._pid = 0
        self.finished = self.closed = False

    def fileno(self) -> int:
        """Returns the descriptor, for poll."""
        return self._connection.fileno()

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._connection.close()

    def received(self) -> Iterator[tuple[int, int]]:
        """Yields the pid and the userfaultfd of each process that CRIU sent since the last call.

        The caller owns the descriptors. Raises NotCriu, OSError.
        """
        while not self.closed:
            try:
                if not self._pid:
                    self._read_pid()
                elif (fd := self._descriptor()) >= 0:
                    pid, self._pid = self._pid, 0
                    yield pid, fd
            except BlockingIOError:
                return
            except ConnectionResetError:
                self.closed = True

    def _read_pid(self) -> None:
        data = self._connection.recv(_PID.size - len(self._pid_bytes))
        self._pid_bytes += data
        if not data:
            self.closed = True
        elif len(self._pid_bytes) == _PID.size:
            (pid,) = _PID.unpack(self._pid_bytes)
            self._pid_bytes = b""
            if pid == _FINISHED:
                self.finished = True
            elif pid > 0:
                self._pid = pid

    def _descriptor(self) -> int:
        """Returns the descriptor that follows a pid; -1 at the end of the connection."""
        fds = array.array("i")
        data, ancillary, _, _ = self._connection.recvmsg(
            1, socket.CMSG_SPACE(_MAX_FDS * fds.itemsize)
        )
        for level, kind, found in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(found[: len(found) - len(found) % fds.itemsize])
        if not data and not fds:
            self.closed = True
            return -1
        if not data or len(fds) != 1:
            for fd in fds:
                socket.close(fd)
            raise NotCriu(f"process {self._pid} came with {len(fds)} descriptors, not 1")
        return fds[0]
