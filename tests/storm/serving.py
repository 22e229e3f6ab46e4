"""The page server of a storm without a container: `python3 -m tests.storm.serving DIRECTORY HOW`.

The product's server without the guard, slowed down, so that filling lasts as long as the storm;
and, for the test of the test, with a planted error.
"""

import json
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from shim.kernel.priority import killed_with_parent
from shim.memory.layout import SpaceLayout, decode_ranges
from shim.memory.serve import filling
from shim.memory.serve.filling import Filling
from shim.memory.serve.payload import Payload
from shim.memory.serve.server import Server
from tests.storm import planted

if TYPE_CHECKING:
    from shim.memory.serve.guard import Guard


@dataclass(frozen=True, slots=True)
class How:
    """The speed of the server.

    piece_kib: filled at once, every `pause_s` by each of the threads, for `slow_s` seconds; then at
    full speed. plant: see `planted`.
    """

    piece_kib: int = 64
    pause_s: float = 0.01
    threads: int = 2
    slow_s: float = 2.0
    plant: str = ""


class NoGuard:
    """Stands in for `shim.memory.serve.guard.Guard`."""

    def __init__(self) -> None:
        self._pipe = os.pipe()

    def fileno(self) -> int:
        """Returns a descriptor that is never readable."""
        return self._pipe[0]

    def beat(self) -> None:
        """Do nothing: no guard watches."""

    def keep(self, fd: int) -> None:
        """Do nothing: no guard holds copies."""


def slow_down(how: How) -> None:
    """Slow down the filling in this process."""
    filling.PIECE_BYTES = how.piece_kib << 10
    filling.ASKED_BYTES = min(filling.ASKED_BYTES, filling.PIECE_BYTES)
    step, until = Filling._step, time.monotonic() + how.slow_s

    def slowly(self: Filling) -> float:
        pause_s = step(self)
        return max(pause_s, min(how.pause_s, until - time.monotonic()))

    Filling._step = slowly  # type: ignore[method-assign]


def serve(directory: Path, listener: socket.socket, how: How) -> None:
    """Serve until all is filled, or no process is left. Raises the server's exceptions."""
    slow_down(how)
    planted.plant(how.plant)
    spaces, payloads = [], {}
    for ranges in directory.glob("space-*.ranges"):
        data = ranges.with_suffix(".data")
        pid = int(ranges.stem.partition("-")[2])
        areas = json.loads(ranges.with_suffix(".areas").read_text())
        spaces.append(SpaceLayout(pid, data.name, decode_ranges(ranges.read_bytes()), areas, []))
        fd = os.open(data, os.O_RDONLY)
        payloads[data.name] = Payload(data.name, fd, data.stat().st_size, None)
    swap, ours = socket.socketpair()
    ours.send(b".")  # the container is to live
    server = Server("storm", listener, swap, cast("Guard", NoGuard()), spaces, payloads)
    threading.Thread(target=_note_progress, args=(directory, server._filling), daemon=True).start()
    server.run()
    server.close()


def _note_progress(directory: Path, threads: Filling) -> None:
    """Record when the filling ended: a storm after that proves nothing."""
    while any(not space.is_over for space in threads.spaces) or not threads.spaces:
        time.sleep(0.02)
        (directory / ".filling").write_text(str(time.monotonic()))
        (directory / ".filling").rename(directory / "filling")


if __name__ == "__main__":
    killed_with_parent(os.getppid())
    serve(Path(sys.argv[1]), socket.socket(fileno=int(sys.argv[3])), How(**json.loads(sys.argv[2])))
