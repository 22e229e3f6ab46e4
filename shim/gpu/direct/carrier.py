"""Program: holds device memory of one container on its way, and copies it to files or from them.

A process of its own: it has a CUDA context, which costs half a GiB of device memory and can hang,
and both are gone when it is killed. Started with the number of a SOCK_SEQPACKET socket. The first
message brings the descriptors of the control directory, of the payload's directory, and in a
capture of the file that whoever guards the source has locked. One JSON object a request, one an
answer, in turn; `failed` says that it failed and why, `damaged` that the payload is not as it was
captured. `times` of an answer: steps with begin and end on the system's monotonic clock.

    begin   (first, with the descriptors) {}
    warm    gpus                      makes contexts, beside what follows
    load    about, pairs, digests     fills new memory from the files, beside what follows
    close   pids, within_s            gates of these processes; open again when one does not close
    take    within_s, guarded_s       memory of all of them is here; saving to the files begins
    give    pids, within_s            all of it back: what was taken, or loaded when it is loaded
    open    within_s                  gates
    saved   within_s                  waits for the files; answers `about`

When the daemon ends, is stopped, or says nothing for `guarded_s` while memory of the source is
here, the carrier gives it back.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import sys
import time

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)).removesuffix("/shim/gpu/direct"))

from shim.gpu.calls import is_stopped
from shim.gpu.direct import mover, talk
from shim.gpu.direct.device import DriverError
from shim.gpu.direct.gpus import Gpus
from shim.gpu.direct.load import Load
from shim.gpu.direct.pieces import Piece, groups
from shim.gpu.direct.save import Save
from shim.gpu.direct.session import Door, LibraryLost, LibraryRefused, NoLibrary
from shim.gpu.direct.wire import IMPORTED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from shim.gpu.direct.device import DeviceMemory
    from shim.gpu.direct.session import Session

SILENT_S = 20.0
"""A library whose host says nothing for so long opens the gate by itself."""
_RESCUE_S = 100.0
"""Less than the next daemon waits for us: see `shim.gpu.engine`."""
_TRY_S = 10.0
_LOOK_S = 0.2
_STOPPED_LOOKS = 5
"""A daemon that a debugger or a person stops for less than that is waited for."""
_TIMES_FREE = 2
"""Memory goes back before its content is saved if the device has so many times more: for the copy
of it, and as much that the source may ask for meanwhile.
"""


class Carrier:
    """control_dirfd, payload_dirfd: see the module. Serves one container, once."""

    def __init__(self, control_dirfd: int, payload_dirfd: int) -> None:
        self._door = Door(control_dirfd)
        self._payload_dirfd = payload_dirfd
        self._gpus = Gpus()
        self._sessions: dict[int, Session] = {}
        self._pids: dict[int, int] = {}  # host's number to the process's own
        self._taken: dict[int, dict[bytes, list[Piece]]] = {}
        self._kept: list[Piece] = []  # given back, and not saved yet
        self._save: Save | None = None
        self._load: Load | None = None
        self._times: list[tuple[str, float, float]] = []
        self.guarded_until = 0.0

    @property
    def is_needed(self) -> bool:
        """Whether the source waits for us."""
        return bool(self._taken)

    def do(self, request: dict[str, Any]) -> dict[str, Any]:
        """One verb. Raises what the modules raise."""
        until = time.monotonic() + float(request.get("within_s", 0.0))
        match request.get("do"):
            case "warm":
                self._gpus.warm([bytes.fromhex(uuid) for uuid in request["gpus"]])
            case "load":
                self._load = Load(self._gpus, self._payload_dirfd, request)
            case "close":
                return self._close(request["pids"], until)
            case "take":
                self.guarded_until = time.monotonic() + float(request["guarded_s"])
                return self._take(until)
            case "give":
                return self._give(request["pids"], until)
            case "open":
                return self._open(until)
            case "saved":
                return self._saved(until)
            case unknown:
                raise ValueError(f"no such verb: {unknown!r:.40}")
        return {}

    def _close(self, pids: list[int], until: float) -> dict[str, Any]:
        """Those without a library of ours, or without large memory, need no gate."""
        seen = {}
        for pid in [each for each in pids if each not in self._sessions]:
            with contextlib.suppress(NoLibrary):
                self._sessions[pid] = self._door.call(pid, until)
        for pid, session in self._sessions.items():
            within_s = max(0.05, until - time.monotonic())
            session.close_gate(within_s, SILENT_S, until + 1.0)
            self._pids[pid] = session.hello.pid
            seen[str(pid)] = session.hello.seen
        return {"seen": seen}

    def _take(self, until: float) -> dict[str, Any]:
        for pid, session in self._sessions.items():
            taken: dict[bytes, list[Piece]] = {}
            for batch in session.lend(until):
                for lent in batch:
                    try:
                        memory = self._gpus.gpu(lent.uuid).imported(lent.fd, lent.octets)
                    except BaseException:
                        os.close(lent.fd)
                        raise
                    piece = Piece(lent.number, memory, lent.fd)
                    taken.setdefault(lent.uuid, []).append(piece)
            self._taken[pid] = taken
        for session in self._sessions.values():
            session.drop(until)
        self._hang_up()
        about = self._about()
        self._save = Save(self._gpus, self._payload_dirfd, about, self._all_taken())
        return {"octets": sum(n for each in about["processes"] for _, n, _ in each["pieces"])}

    def _all_taken(self) -> dict[bytes, list[DeviceMemory]]:
        found: dict[bytes, list[DeviceMemory]] = {}
        for taken in self._taken.values():
            for uuid, pieces in taken.items():
                found.setdefault(uuid, []).extend(piece.memory for piece in pieces)
        return found

    def _about(self) -> dict[str, Any]:
        """The order is that of the payload: of each GPU, process by process, piece by piece."""
        gpus = sorted({uuid for taken in self._taken.values() for uuid in taken})
        return {
            "chunk": mover.CHUNK_BYTES,
            "files": mover.FILES,
            "gpus": [uuid.hex() for uuid in gpus],
            "processes": [
                {
                    "pid": self._pids[pid],
                    "pieces": [
                        [piece.number, piece.memory.octets, gpus.index(uuid)]
                        for uuid, pieces in sorted(taken.items())
                        for piece in pieces
                    ],
                }
                for pid, taken in self._taken.items()
            ],
        }

    def _give(self, pids: list[int], until: float) -> dict[str, Any]:
        if self._load is not None:
            self._give_loaded(self._load.by_process(until), pids, until)
            return {"times": [*self._load.times, *self._times]}
        early = self._save is not None and self._save.is_going_on and self._has_room()
        if self._save is not None and not early:
            self._save.wait(until)
        for pid, taken in list(self._taken.items()):
            session = self._call(pid, until)
            for pieces in taken.values():
                self._fill(session, pieces, until, keep=early)
            if early and self._save is not None and IMPORTED in session.state(until).seen:
                self._save.wait(until)  # there was no room after all: it uses what is being saved
            del self._taken[pid]
        return {}

    def _has_room(self) -> bool:
        """Whether the devices have room for the memory a second time, and generously."""
        needed: dict[bytes, int] = {}
        for taken in self._taken.values():
            for uuid, pieces in taken.items():
                needed[uuid] = needed.get(uuid, 0) + sum(each.memory.octets for each in pieces)
        return all(
            self._gpus.gpu(uuid).free_bytes() >= _TIMES_FREE * octets
            for uuid, octets in needed.items()
        )

    def _give_loaded(self, loaded: dict[int, list[Piece]], pids: list[int], until: float) -> None:
        began = time.monotonic()
        for pid in pids:
            with contextlib.suppress(NoLibrary):
                session = self._call(pid, until)
                self._fill(session, loaded.pop(session.hello.pid, []), until)
        if loaded:
            raise LibraryLost(f"no process for the memory of {sorted(loaded)}")
        self._times.append(("gpu_map", began, time.monotonic()))

    def _call(self, pid: int, until: float) -> Session:
        """A library that is talked to already calls no second time."""
        if pid in self._sessions:
            self._sessions.pop(pid).close()
        self._sessions[pid] = self._door.call(pid, until)
        return self._sessions[pid]

    def _fill(
        self, session: Session, pieces: list[Piece], until: float, *, keep: bool = False
    ) -> None:
        """A few at a time, each let go before the next: there need not be room for all twice.

        pieces: loses what was given. keep: let nothing go.
        """
        away = 0
        for group in groups(list(pieces)):
            lent = [(piece.number, piece.descriptor()) for piece in group]
            away, _ = session.fill(lent, own=True, until=until)
            del pieces[: len(group)]
            if keep:
                self._kept += group
            else:
                for piece in group:
                    piece.close()
        if away and not pieces:
            self._check_home(session, until)

    def _check_home(self, session: Session, until: float) -> None:
        """Raises Lost when memory is away that nobody is about to give."""
        waiting = sum(map(len, self._taken.get(session.pid, {}).values()))
        if (away := session.state(until).away) > waiting:
            raise LibraryLost(f"{away} pieces of process {session.pid} are away")

    def rescue(self) -> None:
        """Give memory of the source back when the commanding process has died. The driver's guard
        lets the source run again; calls of the driver in the source wait until then.
        """
        until = time.monotonic() + _RESCUE_S
        while self._taken and time.monotonic() < until:
            for pid in [each for each in self._taken if not os.path.exists(f"/proc/{each}")]:
                del self._taken[pid]
            with contextlib.suppress(*_KNOWN):
                self._give(list(self._taken), time.monotonic() + _TRY_S)
                self._open(time.monotonic() + _TRY_S)

    def _open(self, until: float) -> dict[str, Any]:
        for session in self._sessions.values():
            session.open_gate(until)
        self._hang_up()
        return {}

    def _hang_up(self) -> None:
        for session in self._sessions.values():
            session.close()
        self._sessions = {}

    def _saved(self, until: float) -> dict[str, Any]:
        if self._save is None:
            return {"about": self._about()}
        self._save.wait(until)
        while self._kept:
            self._kept.pop().close()
        if self._save.error is not None:
            raise OSError(f"device memory was not saved: {self._save.error}")
        times = [*self._times, ("gpu_save", self._save.began, self._save.ended)]
        return {"about": self._save.about, "times": times}


_KNOWN = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    DriverError,
    NoLibrary,
    LibraryRefused,
    LibraryLost,
)


def serve(ours: socket.socket) -> None:
    """Until the other end is closed, or the daemon is stopped while the source needs us."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # pieces come with one each
    _, fds, _, _ = socket.recv_fds(ours, 16, 3)
    if len(fds) not in (2, 3):
        raise ValueError(f"{len(fds)} descriptors")
    carrier = Carrier(*fds[:2])  # the third is held, and with it its lock, until we end
    answer: dict[str, Any] = {}
    while True:
        try:
            talk.send(ours, answer)
            request = talk.receive(ours) if _is_asked(ours, carrier) else None
        except OSError:
            request = None
        if request is None:
            carrier.rescue()
            return
        try:
            answer = carrier.do(request)
        except _KNOWN as error:
            answer = {
                "failed": f"{type(error).__name__}: {error}",
                "damaged": isinstance(error, mover.PayloadDamaged),
            }  # fmt: skip


def _is_asked(ours: socket.socket, carrier: Carrier) -> bool:
    """Wait for a request. False when the source must not wait any longer for the daemon."""
    daemon, stopped = os.getppid(), 0
    while not select.select([ours], [], [], _LOOK_S if carrier.is_needed else None)[0]:
        stopped = stopped + 1 if is_stopped(daemon) else 0
        if stopped >= _STOPPED_LOOKS or time.monotonic() > carrier.guarded_until:
            return False
    return True


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
