"""One process's library: woken, asked, and left again. Lean.

The library has no socket open while nobody talks to it. Its thread is woken by a signal that no
other thread of the process notices, and then connects to a socket in the control directory.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import stat
import struct
import time

from shim.gpu.direct import wire
from shim.kernel import procfs, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Self

    from shim.gpu.direct.wire import Hello, Lent, WireMessage

_WAKE_AGAIN_S = 0.25
_SYS_TGKILL = 234


class NoLibrary(Exception):
    """The process has no library of ours, or it never made a large allocation."""


class LibraryRefused(Exception):
    """The library says no, in its words; nothing has changed."""


class LibraryLost(Exception):
    """The library did not do what was asked, and memory of the process may be away."""


def service_thread(pid: int) -> int:
    """The library's thread of a process, by the host's number. Raises NoLibrary."""
    with contextlib.suppress(OSError):
        for tid in procfs.threads(pid):
            with contextlib.suppress(OSError):
                if procfs.comm(f"{pid}/task/{tid}") == wire.THREAD.encode():
                    return tid
    raise NoLibrary(f"process {pid} has no thread {wire.THREAD}")


def has_library(pid: int) -> bool:
    """Whether the process has large device memory that the library can move."""
    with contextlib.suppress(NoLibrary):
        return bool(service_thread(pid))
    return False


def _wake(pid: int, tid: int) -> None:
    if ctypes.CDLL(None, use_errno=True).syscall(_SYS_TGKILL, pid, tid, wire.WAKE):
        raise OSError(ctypes.get_errno(), f"thread {tid} of {pid} cannot be woken")


class Door:
    """The socket in one container's control directory, at which its libraries call."""

    def __init__(self, control_dirfd: int) -> None:
        """Raises OSError. control_dirfd: of the directory that the container sees, and writes."""
        self._dirfd = control_dirfd
        self._socket = self._bound()

    def _bound(self) -> socket.socket:
        replace.take_away(wire.SOCKET, dir_fd=self._dirfd)
        made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            made.bind(f"/proc/self/fd/{self._dirfd}/{wire.SOCKET}")
            self._inode = _opened_to_all(self._dirfd)
            made.listen(16)
        except OSError:
            made.close()
            raise
        return made

    def _is_there(self) -> bool:
        """Whether our socket still has its name: the container, and whoever explains, may take it
        away.
        """
        try:
            found = os.stat(wire.SOCKET, dir_fd=self._dirfd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return found.st_ino == self._inode

    def call(self, pid: int, until: float) -> Session:
        """Returns the session of process `pid`. Raises NoLibrary, OSError, TimeoutError."""
        tid = service_thread(pid)
        while (left := until - time.monotonic()) > 0:
            if not self._is_there():
                self._socket.close()
                self._socket = self._bound()
            _wake(pid, tid)
            self._socket.settimeout(min(left, _WAKE_AGAIN_S))
            with contextlib.suppress(TimeoutError):
                return self._accepted(pid, until)
        raise TimeoutError(f"the library of process {pid} does not call")

    def _accepted(self, pid: int, until: float) -> Session:
        while True:
            connection, _ = self._socket.accept()
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            if struct.unpack("3i", credentials)[0] == pid:
                return Session(connection, pid, until)
            connection.close()  # another process of the container, which is not asked now

    def close(self) -> None:
        """Idempotent."""
        if self._socket.fileno() >= 0:
            if self._is_there():
                replace.take_away(wire.SOCKET, dir_fd=self._dirfd)
            self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _opened_to_all(dirfd: int) -> int:
    """Let the container's user connect, whoever that is: who calls is asked of the kernel.

    Returns the socket's inode. The container can put a link in the socket's place at any moment.
    Raises OSError.
    """
    fd = os.open(wire.SOCKET, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dirfd)
    try:
        found = os.fstat(fd)
        if not stat.S_ISSOCK(found.st_mode):
            raise OSError(f"{wire.SOCKET} is no socket: the container has put something else there")
        os.chmod(f"/proc/self/fd/{fd}", 0o666)  # noqa: S103
        return found.st_ino
    finally:
        os.close(fd)


class Session:
    """A library that has called. hello: what it said first, or last to `state`."""

    def __init__(self, connection: socket.socket, pid: int, until: float) -> None:
        self._socket, self.pid = connection, pid
        try:
            self.hello = self._hello(until)
        except BaseException:
            connection.close()
            raise

    def state(self, until: float) -> Hello:
        """As it is now. Raises OSError, LibraryLost."""
        self._send(until, wire.STATE)
        self.hello = self._hello(until)
        return self.hello

    def close_gate(self, within_s: float, silent_s: float, until: float) -> float:
        """Calls of the program wait from now on, and none is inside. Returns the seconds it took.

        Raises LibraryRefused when a call stays inside, or a stream is captured, for longer than
        `within_s`: the gate is open again then. It is opened after `silent_s` without a word, too.
        """
        self._send(until, wire.CLOSE, value=int(within_s * 1e3), count=int(silent_s * 1e3))
        return self._expect(wire.CLOSED, until).value / 1e6

    def lend(self, until: float) -> Iterator[list[Lent]]:
        """The pieces, some at a time, with descriptors that are the caller's to close.

        Raises LibraryRefused, LibraryLost, OSError.
        """
        self._send(until, wire.LEND)
        while True:
            message = self._answer(until)
            try:
                if message.kind == wire.LENT:
                    return
                if message.kind != wire.PIECES:
                    raise LibraryLost(f"the library answers {message.kind}: {message.words()}")
                yield wire.lent(message)
            except wire.Malformed as error:
                raise LibraryLost(str(error)) from error
            finally:
                message.close()
            self._send(until, wire.NEXT)

    def drop(self, until: float) -> float:
        """The process lets its pieces go: whoever has them imported has the only ones."""
        self._send(until, wire.DROP)
        return self._expect(wire.DROPPED, until, broken=LibraryLost).value / 1e6

    def fill(
        self, pieces: Iterable[tuple[int, int]], *, own: bool, until: float
    ) -> tuple[int, float]:
        """Give pieces back, as (number, descriptor). Returns how many are away, and seconds.

        own: their content is copied to memory of the process itself.
        """
        batch: list[tuple[int, int]] = []
        away, took = 0, 0.0
        for piece in [*pieces, None]:
            if piece is not None:
                batch.append(piece)
            if batch and (piece is None or len(batch) == wire.BATCH):
                body, fds = wire.numbers([n for n, _ in batch]), [fd for _, fd in batch]
                self._send(until, wire.FILL, value=int(own), body=body, fds=fds)
                answer = self._expect(wire.FILLED, until, broken=LibraryLost)
                away, took, batch = answer.count, took + answer.value / 1e6, []
        return away, took

    def open_gate(self, until: float) -> None:
        """The program goes on. Raises LibraryLost while anything is away."""
        self._send(until, wire.OPEN)
        self._expect(wire.OPENED, until, broken=LibraryLost)

    def close(self) -> None:
        """Idempotent. A closed gate is opened by the library itself unless something is away."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(
        self,
        until: float,
        kind: int,
        *,
        count: int = 0,
        value: int = 0,
        body: bytes = b"",
        fds: list[int] | None = None,
    ) -> None:
        self._limit(until)
        wire.send(self._socket, kind, count=count, value=value, body=body, fds=fds)

    def _limit(self, until: float) -> None:
        self._socket.settimeout(max(0.001, until - time.monotonic()))

    def _answer(self, until: float) -> WireMessage:
        self._limit(until)
        try:
            return wire.receive(self._socket)
        except (wire.Malformed, EOFError) as error:
            raise LibraryLost(f"process {self.pid}: {error}") from error

    def _hello(self, until: float) -> Hello:
        message = self._expect(wire.HELLO, until)
        try:
            return wire.Hello(message.body)
        except wire.Malformed as error:
            raise LibraryLost(f"process {self.pid}: {error}") from error

    def _expect(
        self, kind: int, until: float, *, broken: Callable[[str], Exception] = LibraryRefused
    ) -> WireMessage:
        message = self._answer(until)
        message.close()
        if message.kind in (wire.BUSY, wire.FAILED):
            raise broken(message.words())
        if message.kind != kind:
            raise LibraryLost(f"process {self.pid}: the library answers {message.kind}, not {kind}")
        return message
