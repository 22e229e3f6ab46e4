"""The way `direct`: large device memory goes around the driver. Lean. See docs/gpu.md.

The library that the container has preloaded closes a gate in front of the driver's functions, so
that no thread of the program is inside, and hands its memory to our carrier. The driver
checkpoints the rest. Here are the two sides as the engine calls them; the work is the carrier's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import sys
import time

from shim.contract.errors import Blame, GpuNotCheckpointed, GpuNotRestored
from shim.contract.paths import CONTROL
from shim.gpu.direct import talk
from shim.gpu.direct.session import Door, LibraryLost, NoLibrary
from shim.gpu.way import ProcessReport

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any

    from shim.contract.errors import QuickthawError
    from shim.gpu.helper import Spawn
    from shim.gpu.way import Evacuation, Loading
    from shim.kernel.steps import Steps

NAME = "direct"
STAYS = "memory that stays"
PROGRAM = f"{os.path.dirname(os.path.abspath(__file__))}/carrier.py"
_ASK_S = 2.0
_GUARD_S = 5.0
"""How long after its deadline a capture that hangs leaves memory to the carrier, which then gives
it back by itself; as `shim.gpu.engine` has it for the driver's helpers.
"""
_HOME_S = 10.0
_CLOSE_S = 5.0
"""How long a call of the program, or a capture of a stream, may keep the gate open."""


class CarrierProcess:
    """The program `carrier`, for one container. error: makes what a failure of it is, of the reason
    and whether the payload is damaged.
    """

    def __init__(
        self,
        spawn: Spawn,
        container: str,
        payload_dirfd: int,
        error: Callable[..., QuickthawError],
        lock: str = "",
    ) -> None:
        self._error = error
        self.times: list[tuple[str, float, float]] = []
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        with its:
            self._child = spawn([sys.executable, "-ISE", PROGRAM, str(its.fileno())], its.fileno())
        with _control(container) as control_dirfd, _locked(lock) as held:
            socket.send_fds(ours, [b"{}"], [control_dirfd, payload_dirfd, *held])
        self._unheard = 1  # it says when it is ready

    def do(self, verb: str, until: float, **more: object) -> dict[str, Any]:
        """The answer. Raises what `error` makes, also of an earlier `post`."""
        self._await_posted(until)
        self.post(verb, until, **more)
        self._unheard -= 1
        return self._hear(until)

    def post(self, verb: str, until: float, **more: object) -> None:
        """The same without waiting for the answer: it has to start first, and others need not wait
        for that. Raises what `error` makes.
        """
        within_s = max(0.0, until - time.monotonic())
        try:
            talk.send(self._socket, {"do": verb, "within_s": within_s, **more})
        except OSError as broken:
            raise self._error(f"the carrier is gone: {broken}") from broken
        self._unheard += 1

    def _await_posted(self, until: float) -> None:
        while self._unheard:
            self._unheard -= 1
            self._hear(until)

    def _hear(self, until: float) -> dict[str, Any]:
        left = max(0.0, until - time.monotonic()) + 1.0  # its own deadline is the better message
        if not select.select([self._socket], [], [], left)[0]:
            raise self._error("the carrier does not answer")
        try:
            found = talk.receive(self._socket)
        except OSError as broken:
            raise self._error(f"the carrier is gone: {broken}") from broken
        if found is None:
            raise self._error("the carrier has died")
        if "failed" in found:
            raise self._error(str(found["failed"]), is_damaged=bool(found.get("damaged")))
        self.times += found.get("times", [])
        return found

    def end(self) -> None:
        """It is gone afterwards, and with it its device memory. Idempotent."""
        self._child.end()
        self._socket.close()


class _Evacuation:
    """See `shim.gpu.way.Evacuation`. It undoes only what it began."""

    splits = True

    def __init__(self, carrier: CarrierProcess, container: str) -> None:
        self._carrier, self._container = carrier, container
        self._pids: list[int] = []
        self._is_closed = self._is_taken = False

    def begin(self, gpus: Sequence[str], until: float) -> None:
        self._carrier.post("warm", until, gpus=list(gpus))

    def prepare(self, pids: Sequence[int], until: float) -> None:
        self._pids = list(pids)
        self._is_closed = True
        self._carrier.do("close", min(until, time.monotonic() + _CLOSE_S), pids=self._pids)

    def evacuate(self, until: float) -> None:
        self._is_taken = True
        guarded_s = max(0.0, until - time.monotonic()) + _GUARD_S
        self._carrier.do("take", until, guarded_s=guarded_s)

    def checkpointed(self, until: float) -> None:
        """The carrier is saving already."""

    def give_back(self, until: float) -> None:
        if self._is_taken:
            with self._unless_home(until):
                self._carrier.do("give", until, pids=self._pids)
            self._is_taken = False

    def resume(self, until: float) -> None:
        if self._is_closed:
            with self._unless_home(until):
                self._carrier.do("open", until)
            self._is_closed = False

    @contextlib.contextmanager
    def _unless_home(self, until: float) -> Iterator[None]:
        """A carrier that failed or has died is no loss to processes that have all their memory."""
        try:
            yield
        except GpuNotCheckpointed:
            self._carrier.end()  # a library talks to one host only
            if away(self._container, self._pids, until):
                raise

    def finish(self, until: float) -> Mapping[str, object]:
        about: Mapping[str, object] = self._carrier.do("saved", until)["about"]
        return about

    def tell(self, steps: Steps) -> None:
        for name, began, ended in self._carrier.times:
            steps.add(name, began, ended)


class _Loading:
    """See `shim.gpu.way.Loading`."""

    def __init__(
        self,
        carrier: CarrierProcess,
        about: Mapping[str, object],
        pairs: Sequence[tuple[bytes, bytes]],
        digests: Mapping[str, Sequence[str]],
    ) -> None:
        self._carrier, self._about, self._digests = carrier, about, digests
        self._pairs = [(old.hex(), new.hex()) for old, new in pairs]

    def begin(self, until: float) -> None:
        more = {"about": self._about, "pairs": self._pairs, "digests": self._digests}
        self._carrier.post("load", until, **more)

    def give_back(self, pids: Sequence[int], until: float) -> None:
        self._carrier.do("give", until, pids=list(pids))

    def resume(self, until: float) -> None:
        self._carrier.do("open", until)

    def end(self) -> None:
        self._carrier.end()

    def tell(self, steps: Steps) -> None:
        for name, began, ended in self._carrier.times:
            steps.add(name, began, ended)


_AGAINST = {
    "peer access": "GPUs may use each other's memory (peer access): a tensor was copied from one "
    "to another, or NCCL does; NCCL_P2P_DISABLE=1 NCCL_CUMEM_ENABLE=0 NCCL_CUMEM_HOST_ENABLE=0",
    "imported handles": "memory of another process is mapped; have the workload close it",
    "open IPC handles": "an IPC handle of another process is open; have the workload close it",
    "shared IPC handles": "an IPC handle was made for another process",
    "managed memory": "there is managed memory; use cudaMalloc",
    "multicast": "there is multicast memory; NCCL_NVLS_ENABLE=0",
    "external memory": "memory or semaphores of another API are imported",
    "graphics": "graphics resources are registered",
    "exported handles": "a handle of its memory was exported; NCCL_CUMEM_ENABLE=0",
}
"""Reasons by the word that the library has for them. Memory that stays is the driver's."""


class DirectWay:
    """See `shim.gpu.way.Way`. spawn: how the carrier is started. digests: of the payload's files
    that nothing else vouches for, by name and chunk.
    """

    name = NAME

    def __init__(
        self, spawn: Spawn, container: str, digests: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self._spawn, self._container, self._digests = spawn, container, digests or {}

    def asked(self, pid: int) -> ProcessReport | None:
        """Asks the library."""
        try:
            with (
                _control(self._container) as control_dirfd,
                Door(control_dirfd) as door,
                door.call(pid, time.monotonic() + _ASK_S) as session,
            ):
                told = session.hello
        except (NoLibrary, LibraryLost, OSError):
            return None
        against = [f"{word}: {_AGAINST[word]}" if word in _AGAINST else word
                   for word in told.seen if word != STAYS]  # fmt: skip
        return ProcessReport(against, told.octets)

    @contextlib.contextmanager
    def evacuation(self, container: str, payload_dirfd: int, lock: str) -> Iterator[Evacuation]:
        def failed(why: str, **_: object) -> GpuNotCheckpointed:
            return GpuNotCheckpointed(
                "cannot take the GPU's memory away", about=container, why=why,
                do="Let quickthaw.io/quiesce end the work on the GPU, or try again.",
            )  # fmt: skip

        carrier = CarrierProcess(self._spawn, container, payload_dirfd, failed, lock)
        try:
            yield _Evacuation(carrier, container)
        finally:
            carrier.end()

    @contextlib.contextmanager
    def loading(
        self,
        container: str,
        payload_dirfd: int,
        about: Mapping[str, object],
        pairs: Sequence[tuple[bytes, bytes]],
    ) -> Iterator[Loading]:
        def failed(why: str, *, is_damaged: bool = False) -> GpuNotRestored:
            error = GpuNotRestored(
                "the GPU's memory was not loaded", about=container, why=why,
                do="Is the device full, or exclusive? See nvidia-smi and the kernel's log.",
            )  # fmt: skip
            # A device that is full, and a loader that dies or hangs, say nothing of the snapshot.
            error.blame = Blame.CONTENT if is_damaged else Blame.OTHER
            return error

        carrier = CarrierProcess(self._spawn, container, payload_dirfd, failed)
        try:
            yield _Loading(carrier, about, pairs, self._digests)
        finally:
            carrier.end()


def away(container: str, pids: Iterable[int], until: float) -> list[str]:
    """Returns in words which of these processes lack memory, or cannot be asked, empty for none.

    Nobody else may talk to their libraries meanwhile. One that is all there, with its gate closed
    and no host, opens the gate by itself.
    """
    found = []
    with contextlib.ExitStack() as held:
        door = None
        for pid in pids:
            try:
                if door is None:
                    control_dirfd = held.enter_context(_control(container))
                    door = held.enter_context(Door(control_dirfd))
                with door.call(pid, min(until, time.monotonic() + _HOME_S)) as session:
                    if session.hello.away:
                        found.append(f"{session.hello.away} pieces of process {pid} are lost")
            except NoLibrary:
                continue
            except (LibraryLost, OSError) as error:
                found.append(f"process {pid} does not tell whether it has its memory: {error}")
    return found


@contextlib.contextmanager
def _locked(lock: str) -> Iterator[list[int]]:
    """The locked file of those who guard the source, for the carrier to hold. Raises OSError."""
    if not lock:
        yield []
        return
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield [fd]
    finally:
        os.close(fd)


@contextlib.contextmanager
def _control(container: str) -> Iterator[int]:
    """The container's control directory. Raises OSError."""
    fd = os.open(f"{CONTROL}/{container}", os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
