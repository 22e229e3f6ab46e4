"""The host's side of the way direct, step by step and timed: what `loop` and `trip` share."""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shim.gpu.direct import mover
from shim.gpu.direct.device import DeviceMemory, Driver, Gpu, processors
from shim.gpu.direct.mover import Move, Ring
from shim.gpu.direct.session import Door, LibraryRefused, Session
from tests.gpu.children import Helper

STEP_S = 30.0
TRIES = 5


class Timer:
    """Seconds of each step, in order; with `at` when each ended."""

    def __init__(self) -> None:
        self.took: dict[str, float] = {}
        self.at: dict[str, float] = {}
        self.began = time.perf_counter()
        self.now = "start"

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.now = name
        began = time.perf_counter()
        yield
        ended = time.perf_counter()
        self.took[name] = round(ended - began, 5)
        self.at[name] = round(ended - self.began, 4)


@dataclass
class Held:
    """Pieces that a process has let go."""

    uuid: bytes
    numbers: list[int]
    fds: list[int]
    memory: list[DeviceMemory]

    @property
    def sizes(self) -> list[int]:
        return [each.octets for each in self.memory]

    def let_go(self) -> None:
        for each in self.memory:
            each.close()
        while self.fds:
            os.close(self.fds.pop())


class Host:
    """files: the directory for the payload."""

    def __init__(self, control: Path, files: Path, helper: Helper) -> None:
        self._dirfd = os.open(control, os.O_DIRECTORY)
        self.door = Door(self._dirfd)
        self.files, self.helper = files, helper
        self.driver = Driver()
        self.gpus: dict[bytes, tuple[Gpu, Ring]] = {}
        self.busy: list[str] = []
        self.seen: list[str] = []

    def gpu(self, uuid: bytes) -> tuple[Gpu, Ring]:
        if uuid not in self.gpus:
            gpu = Gpu(self.driver, uuid)
            gpu.use()
            self.gpus[uuid] = gpu, Ring(gpu, processors())
        self.gpus[uuid][0].use()
        return self.gpus[uuid]

    def call(self, pid: int, do: str, **more: Any) -> float:
        answer = self.helper.do(do, pid, timeout_s=STEP_S, **more)
        if answer["code"]:
            raise RuntimeError(f"{do}: {answer}")
        return float(answer["ms"])

    def take(self, pid: int, timer: Timer) -> Held:
        """The gate is closed afterwards, and the memory with us."""
        until = time.monotonic() + STEP_S
        with timer.step("call"):
            session = self.door.call(pid, until)
        self.seen = [*session.hello.seen, session.hello.said]
        with session:
            with timer.step("close"):
                self.close(session, until)
            with timer.step("lock"):
                self.call(pid, "lock", timeout_ms=5000)
            with timer.step("unlock"):
                self.call(pid, "unlock")
            with timer.step("lend"):
                held = self.lent(session, until)
            with timer.step("drop"):
                session.drop(until)
        return held

    def lent(self, session: Session, until: float) -> Held:
        held = Held(b"", [], [], [])
        for batch in session.lend(until):
            for piece in batch:
                held.uuid = piece.uuid
                held.numbers.append(piece.number)
                held.fds.append(piece.fd)
                held.memory.append(self.gpu(piece.uuid)[0].imported(piece.fd, piece.octets))
        return held

    def close(self, session: Session, until: float) -> None:
        for _ in range(TRIES):
            try:
                session.close_gate(3.0, 20.0, until)
            except LibraryRefused as busy:
                self.busy.append(str(busy))
            else:
                return
        raise RuntimeError(f"the gate does not close: {self.busy[-1]}")

    def give(self, pid: int, held: Held, timer: Timer, *, own: bool = True) -> None:
        """The process goes on."""
        until = time.monotonic() + STEP_S
        with timer.step("call again"):
            session = self.door.call(pid, until)
        with session:
            with timer.step("fill"):
                pieces = zip(held.numbers, held.fds, strict=True)
                away, _ = session.fill(pieces, own=own, until=until)
            if away:
                raise RuntimeError(f"{away} pieces are away")
            with timer.step("open"):
                session.open_gate(until)

    def save(self, held: Held) -> None:
        with self.opened(os.O_RDWR | os.O_CREAT) as fds:
            move = Move(self.gpu(held.uuid)[1], held.memory, fds)
            move.save(mover.layout(held.sizes))

    def made(self, uuid: bytes, numbers: list[int], sizes: list[int], timer: Timer) -> Held:
        """New memory with the content of the files."""
        gpu, ring = self.gpu(uuid)
        with timer.step("make"):
            memory = [gpu.created(size) for size in sizes]
        with timer.step("load"), self.opened(os.O_RDONLY) as fds:
            Move(ring, memory, fds).load(mover.layout(sizes))
        return Held(uuid, numbers, [each.export() for each in memory], memory)

    @contextlib.contextmanager
    def opened(self, flags: int) -> Iterator[list[int]]:
        with contextlib.ExitStack() as stack:
            fds = []
            for number in range(mover.FILES):
                fds.append(os.open(self.files / mover.name(0, number), flags, 0o600))
                stack.callback(os.close, fds[-1])
            yield fds
