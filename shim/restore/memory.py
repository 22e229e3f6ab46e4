"""Starts the page server of a swap, and tells it whether to go on. Lean."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time

from shim.contract.errors import Blame, MemoryNotServed, QuickthawError
from shim.criu.log import is_killed
from shim.kernel import alarm, process, procfs, replace, userfault
from shim.memory import layout
from shim.memory.serve import messages
from shim.memory.serve.fifos import Asked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from shim.contract.ticket import Ticket
    from shim.integrity.check import SnapshotCheck, Unchecked
    from shim.memory.layout import Layout

SOCKET = "lazy-pages.socket"
"""The name in CRIU's work directory. Source: CRIU, criu/include/uffd.h."""
_ENDED, _LOOK = "the page server has ended", "Look for its end in the kernel's log."
_CUT = "CRIU succeeded, and its connection ended before it had sent every process"
_ENDS_WITHIN_S = 5.0
_SHORTLY_S = 0.01
_KILLED_WITHIN_S = 1.0
"""A guard kills the processes of a restore first, and then the page server that stands still."""


class PageServer:
    """The swap's handle on its page server. Either `keep` or `end` must follow."""

    def __init__(self, ticket: Ticket, pid: int, its: socket.socket) -> None:
        self._ticket, self._pid, self._its = ticket, pid, its
        self._is_filled = self._is_kept = self._is_ordinary = False

    def wait_until_ready(self, until: float) -> None:
        """Wait until the server has all messages that CRIU sends. until: on `time.monotonic`.

        Raises MemoryNotServed if the server has ended or does not answer.
        """
        self._hear(until, "the page server does not answer")

    def wait_until_filled(self, until: float) -> None:
        """Wait until all private memory is there: after `wait_until_ready`, before `keep`.

        Raises MemoryNotServed when it has ended, or not all is there in time.
        """
        while not self._is_filled:
            self._hear(until, "memory is still being filled")

    def finish(self, until: float) -> None:
        """Wait until the memory is filled and ordinary, and `keep` it: before anything that changes
        the address space much, which would wait for us at each change. Raises MemoryNotServed.
        """
        self.wait_until_filled(until)
        self.keep()
        while not self._is_ordinary:
            self._hear(until, "the memory is not ordinary yet")

    def _hear(self, until: float, late: str) -> None:
        self._its.settimeout(max(_SHORTLY_S, until - time.monotonic()))
        try:
            is_cut, why = self._read()
        except TimeoutError:
            raise _not_served(self._ticket, late, _LOOK) from None
        if is_cut or why:
            raise _not_served(self._ticket, why or _CUT, _LOOK)

    @contextlib.contextmanager
    def first_cause(self) -> Iterator[None]:
        """Ask the server first when a step fails: it kills the processes if it cannot go on.

        Raises as `check_cause`, or the step's error.
        """
        try:
            yield
        except QuickthawError as error:
            self.check_cause(error.why)
            raise

    def check_cause(self, reason: str) -> None:
        """Raises MemoryNotServed if the server failed first, or found damage.

        reason: of the failure, as CRIU's. When CRIU ends before it is done, the server's connection
        to CRIU breaks off anywhere. That is a consequence: this returns, the reason is the cause.
        """
        self._its.settimeout(_KILLED_WITHIN_S if is_killed(reason) else 0)
        try:
            is_cut, why = self._read()
        except (BlockingIOError, TimeoutError):
            return
        if why and not is_cut:
            raise _not_served(self._ticket, f"{why}, and then {reason}", _LOOK)

    def _read(self) -> tuple[bool, str]:
        """Read the server's messages. Returns whether CRIU ended early, and why the server ended.

        Raises MemoryNotServed for a damaged snapshot, whoever ended first; BlockingIOError,
        TimeoutError.
        """
        try:
            message = self._its.recv(messages.MOST_BYTES)
        except ConnectionResetError:  # the server has ended, and has not read our last byte
            message = b""
        last = message.lstrip(messages.PROGRESS)
        came = message[: len(message) - len(last)]
        self._is_filled |= messages.FILLED in came
        self._is_ordinary |= messages.ORDINARY in came
        why = last[1:].decode(errors="replace") or ("" if came and not last else _ENDED)
        if last.startswith(messages.DAMAGED):
            raise _damaged(self._ticket, why)
        return messages.CUT in came, why

    def keep(self) -> None:
        """Have the server complete the container's memory, whatever happens here.

        Raises MemoryNotServed when the server has ended too early. Idempotent.
        """
        if not self._is_kept:
            try:
                self._its.send(messages.KEEP)
            except (BrokenPipeError, ConnectionResetError):
                _, why = self._read()
                raise _not_served(self._ticket, why or _ENDED, _LOOK) from None
            self._is_kept = True

    def end(self) -> None:
        """End the server, because the swap is undone. Returns when the server is gone."""
        self._its.close()
        with alarm.held():
            # The server ends by itself, unless it hangs.
            if not process.ends(self._pid, time.monotonic() + _ENDS_WITHIN_S):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)


def _not_served(ticket: Ticket, why: str, do: str) -> MemoryNotServed:
    return MemoryNotServed("cannot serve the memory", about=ticket.container, why=why, do=do)


def _damaged(ticket: Ticket, why: str) -> MemoryNotServed:
    do = f"Run `quickthaw rm {ticket.snapshot[:12]}`; the next pod makes a new one."
    failed = _not_served(ticket, why, do)
    failed.blame = Blame.CONTENT
    return failed


def read_layout(
    ticket: Ticket, files: Mapping[str, bytes], data: Mapping[str, Unchecked]
) -> Layout:
    """Returns the layout of the snapshot's memory. Raises MemoryNotServed.

    files: the checked small files of the memory. data: the unchecked data files.
    """
    try:
        return layout.decode(files, {name: each.size for name, each in data.items()})
    except layout.BadLayout as error:
        raise _damaged(ticket, str(error)) from error


def start(ticket: Ticket, check: SnapshotCheck, memory: Layout, view: str, work: str) -> PageServer:
    """Start a page server that listens in `work`.

    view: the directory of CRIU's images, in which the images of shared memory are fifos. Raises
    MemoryNotServed, OSError.
    """
    if why := userfault.unavailable():
        raise _not_served(ticket, why, "Use a kernel with CONFIG_USERFAULTFD.")
    listener = _listener(work)
    answers = {each.image: check.images[each.image] for each in memory.shared}
    asked = Asked(ticket.container, view, answers)
    ours, its = socket.socketpair()
    pid = os.fork()
    if not pid:
        _become(ticket, check, memory, asked, listener, its)
    asked.close()
    its.close()
    listener.close()
    return PageServer(ticket, pid, ours)


def _listener(work: str) -> socket.socket:
    """Returns a socket in a directory whose path may be too long for an address."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dirfd = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        replace.take_away(SOCKET, dir_fd=dirfd)
        listener.bind(f"/proc/self/fd/{dirfd}/{SOCKET}")
        listener.listen(1)
    finally:
        os.close(dirfd)
    return listener


def _become(
    ticket: Ticket,
    check: SnapshotCheck,
    memory: Layout,
    asked: Asked,
    listener: socket.socket,
    swap: socket.socket,
) -> None:
    """Become the page server in the fork. No code of the caller may run on here."""
    try:
        os.setsid()
        alarm.cancel()
        _let_go(check.snapshot_dirfd, listener.fileno(), swap.fileno(), *asked.filenos())
        # Only here: the swap needs no threads, and does not wait for these imports.
        from shim.memory.serve.main import serve

        data, dirfd = check.unchecked, check.snapshot_dirfd
        serve(ticket, dirfd, data, memory, asked, listener, swap)
    finally:
        os._exit(0)


def _let_go(*kept: int) -> None:
    """Close the pod's log and the caller's other files: their readers wait for the end."""
    process.let_go_of_streams()
    for fd in [int(name) for name in procfs.descriptors("self")]:
        if fd > 2 and fd not in kept:
            with contextlib.suppress(OSError):
                os.close(fd)
