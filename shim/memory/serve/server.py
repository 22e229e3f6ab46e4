"""Serves page faults of a restored container, from before CRIU starts until all memory is there.

CRIU sends the server a userfaultfd for each process that it restores. Page faults are served first;
the threads of `shim.memory.serve.filling` fill the rest: the working set of earlier restores,
already while CRIU restores, then everything by address. When all is filled, the server closes the
descriptors and ends: the areas are ordinary then. A page server, a process for each restore, needs
no other: the daemon may be away, and `quickthaw-runc` has ended long before. But the server must
not end before it is done: see `shim.memory.serve.guard`. Lean.
"""

from __future__ import annotations

import contextlib
import os
import select

from shim.contract import faults
from shim.kernel import priority
from shim.kernel.userfault import Gone
from shim.memory.extents import Extents
from shim.memory.serve.filling import NICE, PIECE_BYTES, Filling
from shim.memory.serve.lazysocket import LazySocket
from shim.memory.serve.messages import CUT, FILLED, READY
from shim.memory.serve.payload import Damaged
from shim.memory.serve.space import Space
from shim.memory.serve.workingset import Recorder, ranges

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Mapping, Sequence

    from shim.memory.layout import SpaceLayout
    from shim.memory.serve.guard import Guard
    from shim.memory.serve.payload import Payload
    from shim.memory.serve.shared import Filler

_TICK_MS = 1000
_RETRY_MS = 5
_FIRST = -20
"""Otherwise the thread that serves faults waits for a filling thread until the next tick."""


class Abandoned(Exception):
    """The swap was given up, or CRIU ended before it was done: no process needs the memory."""


class Server:
    """Serves all address spaces of a restore.

    listener: the socket that CRIU connects to. swap: a socket to the swap. The server sends READY
    when it holds the userfaultfd of every process, FILLED when all memory is there, and CUT when
    CRIU ended before READY. A byte from the swap says that the container is to live; the end of the
    connection without a byte says that it is not.
    """

    def __init__(
        self,
        container: str,
        listener: socket.socket,
        swap: socket.socket,
        guard: Guard,
        memory: Sequence[SpaceLayout],
        payloads: Mapping[str, Payload],
        first: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._container, self._listener, self._swap = container, listener, swap
        self._guard, self._payloads = guard, payloads
        self._memory = {space.pid: space for space in memory}
        self._content = {space.pid: Extents(space.extents) for space in memory}
        self._criu: LazySocket | None = None
        self._filling = Filling()
        self._kept = self._started = self._told_filled = self._is_cut = False
        self._first = first
        self.recorder = Recorder()
        self._poll = select.poll()
        self._by_fd: dict[int, Space] = {}
        self._filler: Filler | None = None
        for fd in (listener.fileno(), swap.fileno(), guard.fileno(), self._filling.told_fd):
            self._poll.register(fd, select.POLLIN)

    def watch(self, filler: Filler) -> None:
        """Have `filler` fill shared memory: it must be done before the processes run."""
        self._filler = filler
        self._poll.register(filler.fileno(), select.POLLIN)

    def run(self) -> None:
        """Serve until all memory is there. Raises Abandoned; any other error ends the container.

        After the end of CRIU, errors are consequences of that end, but for damaged content.
        Afterwards the descriptors are still open: see `close`.
        """
        try:
            self._run()
        except (Abandoned, Damaged):
            raise
        except Exception as error:
            if self._is_cut:
                raise Abandoned("CRIU ended before it was done") from error
            raise

    def _run(self) -> None:
        faults.point("memory.started", self._container)
        priority.be_nice(_FIRST)
        first = ranges(self._first)
        self._filling.begin(first, self._ahead(first))
        while not self._is_over():
            late = any(space.waiting for space in self._by_fd.values())
            ready = {fd for fd, _ in self._poll.poll(_RETRY_MS if late else _TICK_MS)}
            self._guard.beat()
            if spaces := [
                space for fd, space in self._by_fd.items() if fd in ready or space.waiting
            ]:
                self._serve(spaces)
            if others := ready - self._by_fd.keys():
                self._look_at(others)

    def close(self) -> None:
        """Close the descriptors, which makes the memory ordinary. Idempotent."""
        priority.be_nice(NICE)
        self._filling.stop()
        for space in self._by_fd.values():
            space.close()

    def _is_over(self) -> bool:
        if self._filling.error:
            raise self._filling.error
        if not self._started or (self._told_filled and not self._kept):
            return False
        if any(not space.is_over or space.waiting for space in self._by_fd.values()):
            return False
        with self._filling.hold():  # a thread may put back an extent that it has taken
            if any(not space.is_over or space.waiting for space in self._by_fd.values()):
                return False
        if not self._kept:
            self._told_filled = True
            with contextlib.suppress(OSError):  # it has ended, which the next look at it shows
                self._swap.send(FILLED)
        return self._kept

    def _look_at(self, ready: set[int]) -> None:
        if self._filling.told_fd in ready:
            os.eventfd_read(self._filling.told_fd)
        if self._filler and self._filler.fileno() in ready:
            fd = self._filler.fileno()
            self._filler.hear()
            if self._filler.fileno() < 0:
                self._poll.unregister(fd)
        if self._guard.fileno() in ready:
            self._poll.unregister(self._guard.fileno())
            self._poll.register(self._guard.renew(), select.POLLIN)
        if self._listener.fileno() in ready:
            self._poll.unregister(self._listener.fileno())
            self._criu = LazySocket(self._listener.accept()[0])
            self._poll.register(self._criu.fileno(), select.POLLIN)
        if self._criu and self._criu.fileno() in ready:
            self._hear(self._criu)
        if self._swap.fileno() in ready:
            if not self._swap.recv(1):
                raise Abandoned("the swap was given up")
            self._poll.unregister(self._swap.fileno())
            self._kept = True

    def _hear(self, criu: LazySocket) -> None:
        for pid, fd in criu.received():
            with self._filling.hold():
                self._add(self._space(pid, fd))
        if criu.finished and not self._started:
            faults.point("memory.told", self._container)
            if self._filler:
                self._filler.must_be_done()
            self._started = True
            self._filling.start()
            self._swap.send(READY)
            faults.point("memory.filling", self._container)
        if criu.closed:
            self._poll.unregister(criu.fileno())
            criu.close()
            if not criu.finished:
                self._is_cut = True
                with contextlib.suppress(OSError):  # it has ended, which the next look at it shows
                    self._swap.send(CUT)

    def _ahead(self, first: Sequence[tuple[int, int, int]]) -> Iterator[tuple[Payload, int, int]]:
        """Yields payload, offset and size of content: of the working set, then of everything."""
        for pid, start, end in first:
            if found := self._memory.get(pid):
                for begin, behind, offset in self._content[pid].within(start, end):
                    yield self._payloads[found.data], offset, behind - begin
        for found in self._memory.values():
            for begin, behind, offset in found.extents:
                for at in range(0, behind - begin, PIECE_BYTES):
                    size = min(PIECE_BYTES, behind - begin - at)
                    yield self._payloads[found.data], offset + at, size

    def _space(self, pid: int, fd: int) -> Space:
        found = self._memory.get(pid)
        if not found:
            return Space(fd, pid, Extents(), None, Extents())
        areas = Extents((start, end, 0) for start, end in found.areas)
        missing = self._content[pid].copy()
        return Space(fd, pid, missing, self._payloads[found.data], areas)

    def _add(self, space: Space) -> None:
        self._guard.keep(space.fd)
        self._by_fd[space.fd] = space
        self._filling.add(space)
        self._poll.register(space.fd, select.POLLIN)

    def _serve(self, ready: Sequence[Space]) -> None:
        """Take up the kernel's messages about these spaces, until it has no more."""
        with self._filling.hold():
            spaces = list(ready)
            for space in spaces:
                asked, children = space.listen()
                for child in children:
                    self._add(child)
                    spaces += [child] if child.told else []
                for address in dict.fromkeys(asked):
                    self._filling.asked()
                    self._give(space, address)

    def _give(self, space: Space, address: int) -> None:
        if space.is_gone:
            return
        try:
            space.serve(address, self.recorder.asked)
        except Gone:
            space.is_gone = True
            space.waiting.clear()
        except OSError as error:
            self._filling.refused(error)
            space.waiting.append(address)
