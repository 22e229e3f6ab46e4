"""A page server whose CRIU ends before it is done: a consequence, which it reports as such."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from typing import TYPE_CHECKING, cast

import pytest

from shim.memory.serve import messages
from shim.memory.serve.fifos import NotFilled
from shim.memory.serve.payload import Damaged
from shim.memory.serve.server import Abandoned, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from shim.memory.serve.guard import Guard
    from shim.memory.serve.shared import Filler

A_PID = struct.pack("<i", 20)


class Pipe:
    """Stands in for the guard and for the filler. error: raised when the server hears it."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error
        self._fds = os.pipe()

    def fileno(self) -> int:
        return self._fds[0]

    def complain(self) -> None:
        os.write(self._fds[1], b".")

    def hear(self) -> None:
        if self._error:
            raise self._error

    def beat(self) -> None:
        pass

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)


class Running:
    """A server in a thread. ended: with its exception, if it had one."""

    def __init__(self, path: Path, filler: Pipe, stack: contextlib.ExitStack) -> None:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(path / "socket"))
        listener.listen(1)
        self.criu = stack.enter_context(socket.socket(socket.AF_UNIX))
        self.criu.connect(str(path / "socket"))
        self.swap, its = (stack.enter_context(each) for each in socket.socketpair())
        self.swap.settimeout(10)
        guard = stack.enter_context(contextlib.closing(Pipe()))
        self._server = Server("c", listener, its, cast("Guard", guard), [], {})
        self._server.watch(cast("Filler", filler))
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._server.run()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.error = error
        self._server.close()
        if self._server._criu:
            self._server._criu.close()

    def ended(self) -> BaseException | None:
        self._thread.join(10)
        assert not self._thread.is_alive()
        return self.error


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[[Pipe], Running]]:
    with contextlib.ExitStack() as stack:
        yield lambda filler: Running(tmp_path, filler, stack)


@pytest.mark.parametrize("sent", [b"", A_PID[:2], A_PID, struct.pack("<i", -20)])
def test_end_of_criu_is_told_and_the_swap_decides(
    run: Callable[[Pipe], Running], sent: bytes
) -> None:
    with contextlib.closing(Pipe()) as filler:
        running = run(filler)
        running.criu.send(sent)
        running.criu.close()
        assert running.swap.recv(9) == messages.CUT
        assert running.error is None
        running.swap.close()
        assert isinstance(running.ended(), Abandoned)


def test_complaint_after_the_end_of_criu_is_a_consequence(run: Callable[[Pipe], Running]) -> None:
    with contextlib.closing(Pipe(NotFilled("the filler was killed"))) as filler:
        running = run(filler)
        running.criu.close()
        assert running.swap.recv(9) == messages.CUT
        filler.complain()
        assert isinstance(running.ended(), Abandoned)


@pytest.mark.parametrize("first", [True, False])
def test_damage_is_never_a_consequence(run: Callable[[Pipe], Running], *, first: bool) -> None:
    with contextlib.closing(Pipe(Damaged("chunk 0"))) as filler:
        running = run(filler)
        if not first:
            running.criu.close()
            assert running.swap.recv(9) == messages.CUT
        filler.complain()
        assert isinstance(running.ended(), Damaged)


def test_complaint_while_criu_goes_on_is_a_cause(run: Callable[[Pipe], Running]) -> None:
    with contextlib.closing(Pipe(NotFilled("the filler was killed"))) as filler:
        running = run(filler)
        running.criu.send(A_PID)
        filler.complain()
        assert isinstance(running.ended(), NotFilled)
