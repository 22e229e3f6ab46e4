"""A capture's part that the CUDA driver does: lock and checkpoint all, and back, whatever happens.

The order is here, the calls are `helper`'s, what else happens to the memory is the way's. All
processes are locked before one is checkpointed, and all are brought back by the state that each is
in. One that cannot be brought back is stuck for good: then the container is killed, so that kubelet
starts it again. Blocking.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

from shim.contract import faults, journal
from shim.contract.errors import GpuLost, GpuNotCheckpointed
from shim.contract.paths import CONTAINER_GPU_LOCK, CONTAINERS
from shim.gpu import helper, processes, ways
from shim.gpu.helper import CHECKPOINTED, LOCKED, RUNNING, Team
from shim.kernel import procfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

    from shim.gpu.helper import DriverAnswer, Spawn
    from shim.gpu.way import Evacuation
    from shim.kernel.steps import Steps

GUARD_S = 5.0
"""How long after its deadline a capture that hangs leaves its processes to their guards."""
BACK_S = 120.0
"""For restore and unlock of what was checkpointed: 100 GiB take 16 s on an H200."""
_LOCK_S = 10.0
"""How long work on the device may go on after the lock is asked for."""
_ANSWER_S = 2.0
_ROUNDS = 5
"""How often new CUDA processes may appear while the others are being locked."""
_ORPHANS_S = 10.0
_LOOK_S = 0.02
_SETTLES_S = 0.5
"""A process that was stopped does what was asked of it as soon as it runs again."""
_TRY_AGAIN = (helper.ILLEGAL_STATE, helper.NO_ANSWER)


class Engine:
    """The CUDA processes of one container, while they are captured.

    listed: the container's processes at this moment, host pids. team: helpers that guard.
    steps: filled while it works. until: the capture's, on `time.monotonic`.
    """

    def __init__(
        self,
        container: str,
        listed: Callable[[], Iterable[int]],
        team: Team,
        steps: Steps,
        until: float,
    ) -> None:
        self._container, self._listed, self._team = container, listed, team
        self._steps, self._until = steps, until
        self.pids: list[int] = []
        self._starts: dict[int, int] = {}

    def find(self) -> list[int]:
        """CUDA processes that are not known yet; they are from now on. Raises GpuNotCheckpointed.

        The driver knows which: the library alone may be mapped by many.
        """
        found = []
        for pid in processes.candidates(self._listed()):
            if pid in self.pids:
                continue
            told = self._team.state(pid, self._until)
            if told.code == helper.NOT_INITIALIZED:
                continue
            if not told.is_success and os.path.exists(f"/proc/{pid}"):
                raise self._failed(f"the driver does not tell the state of {pid}: {told.name}")
            if told.state == RUNNING:
                self._starts[pid] = procfs.start_ticks(pid)
                found.append(pid)
            elif told.is_success:
                raise self._failed(f"process {pid} is {told.state} already: does something else "
                                   "checkpoint it?")  # fmt: skip
        self.pids += found
        return found

    @contextlib.contextmanager
    def stopped(self, evacuation: Evacuation) -> Iterator[None]:
        """In the `with`, all are checkpointed; afterwards all run. Raises GpuNotCheckpointed when
        they run again, GpuLost when the container had to be killed.
        """
        self._find_again()
        with self._steps.timed("gpu_stopped"):
            try:
                with self._steps.timed("gpu_checkpoint"):
                    self._stop(evacuation)
                faults.point("capture.gpu.checkpointed", self._container)
                yield
            finally:
                with self._steps.timed("gpu_restore"):
                    self._bring_back(evacuation)

    def _find_again(self) -> None:
        """Processes begin and end during the pre-copy. Raises GpuNotCheckpointed."""
        self.pids = [pid for pid in self.pids if processes.exists(pid, self._starts[pid])]
        self.find()
        if not self.pids:
            raise self._failed("its CUDA processes have ended")

    def _stop(self, evacuation: Evacuation) -> None:
        self._note()
        faults.point("capture.gpu.noted", self._container)
        with self._steps.timed("gpu_lock"):
            self._lock_quiet(evacuation)
        faults.point("capture.gpu.locked", self._container)
        if evacuation.splits:
            self._all("unlock")
            with self._steps.timed("gpu_take"):
                evacuation.evacuate(self._until)
            faults.point("capture.gpu.taken", self._container)
            self._lock_all()
        with self._steps.timed("gpu_driver_checkpoint"):
            self._all("checkpoint")
        if new := self.find():
            raise self._failed(f"CUDA processes {new} began while the others were checkpointed")
        evacuation.checkpointed(self._until)

    def _lock_quiet(self, evacuation: Evacuation) -> None:
        """Lock all, their threads outside of the driver where the way wants that: one that waits
        for the lock inside of it would never leave it.
        """
        for _ in range(_ROUNDS):
            prepared = list(self.pids)
            if evacuation.splits:
                evacuation.prepare(prepared, self._until)
            self._lock_all()
            if self.pids == prepared or not evacuation.splits:
                return
            self._all("unlock")
        raise self._failed("new CUDA processes appear again and again")

    def _lock_all(self) -> None:
        """Lock those that are known, and those that begin meanwhile: a locked one begins none."""
        locked: list[int] = []
        for _ in range(_ROUNDS):
            waiting = [pid for pid in self.pids if pid not in locked]
            if not waiting:
                return
            within_s = min(_LOCK_S, max(0.1, self._until - time.monotonic()))
            self._all("lock", waiting, timeout_ms=int(within_s * 1000))
            locked += waiting
            if self.find():
                self._note()
        raise self._failed("new CUDA processes appear again and again")

    def _all(self, do: str, pids: Iterable[int] = (), **more: Any) -> None:
        until = self._until
        if "timeout_ms" in more:  # which a stopped process does not count
            until = min(until, time.monotonic() + more["timeout_ms"] / 1000 + _ANSWER_S)
        answers = self._team.call(do, list(pids) or self.pids, until, **more)
        for pid, answer in answers.items():
            if answer.code == helper.NOT_READY and do == "lock":
                raise self._failed(f"process {pid} still has work on the GPU after "
                                   f"{more['timeout_ms']} ms")  # fmt: skip
            if not answer.is_success:
                raise self._failed(f"{do} of process {pid}: {answer.name}")

    def _note(self) -> None:
        """Before each change, so that whoever comes next knows whom to bring back."""
        noted = [[pid, self._starts[pid]] for pid in self.pids]
        journal.note(journal.path_of(self._container), journal.GPU, noted)

    def _bring_back(self, evacuation: Evacuation) -> None:
        until = time.monotonic() + BACK_S
        self._team.extend(until + _ANSWER_S)
        with self._steps.timed("gpu_driver_restore"):
            left = bring_back(self._team, self.pids, until)
        try:
            faults.point("capture.gpu.restored", self._container)
        finally:
            if left := left or self._given(evacuation, until):
                raise kill(self._container, self._listed(), left)
            self._team.dismiss(until)
            journal.note(journal.path_of(self._container), journal.GPU, [])

    def _given(self, evacuation: Evacuation, until: float) -> list[str]:
        """Have the way give everything back. Returns why it did not."""
        try:
            with self._steps.timed("gpu_give"):
                evacuation.give_back(until)
                evacuation.resume(until)
        except Exception as error:  # noqa: BLE001 - whatever it is, memory is missing
            return [f"{type(error).__name__}: {error}"]
        return []

    def _failed(self, why: str) -> GpuNotCheckpointed:
        return GpuNotCheckpointed(
            "cannot checkpoint the GPU", about=self._container, why=why,
            do="Let quickthaw.io/quiesce end the work on the GPU, or try again.",
        )  # fmt: skip


def bring_back(team: Team, pids: Iterable[int], until: float) -> list[str]:
    """Make all run again, as each one's state asks for; why some cannot, empty when all do.

    The driver may still complete a call that did not come back: so each process is looked at until
    it runs, or the driver says for good that it does not. One that has ended is not missed.
    """
    left = list(pids)
    failed: dict[int, str] = {}
    while left and not failed:
        states = {pid: team.state(pid, until) for pid in left if os.path.exists(f"/proc/{pid}")}
        left = [pid for pid, told in states.items() if told.state != RUNNING]
        late = time.monotonic() > until
        for do, state in (("restore", CHECKPOINTED), ("unlock", LOCKED)):
            held = [pid for pid in left if states[pid].state == state]
            failed |= _final(do, team.call(do, held, until), is_late=late)
        failed |= {pid: f"process {pid}: {states[pid].name}" for pid in left if late}
        if left and not failed:
            time.sleep(_LOOK_S)  # nothing tells when the driver is done with an earlier call
        elif team.unsettled and not failed:
            time.sleep(_SETTLES_S)
            left, team.unsettled = list(team.unsettled), set()
    return [why for pid, why in failed.items() if os.path.exists(f"/proc/{pid}")]


def _final(do: str, answers: dict[int, DriverAnswer], *, is_late: bool) -> dict[int, str]:
    """The failures after which another try makes no sense."""
    return {
        pid: f"{do} of process {pid}: {answer.name}"
        for pid, answer in answers.items()
        if not answer.is_success and (is_late or answer.code not in _TRY_AGAIN)
    }


def kill(container: str, pids: Iterable[int], why: list[str]) -> GpuLost:
    """End a container whose processes the driver keeps; the error that tells it."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        journal.note(journal.path_of(container), journal.GPU, [])
    return GpuLost(
        "the GPU did not give the source back", about=container, why="; ".join(why),
        do="kubelet starts it again. See the kernel's log for NVRM lines.",
    )  # fmt: skip


def left_over(container: str) -> list[int]:
    """The processes that a daemon which was killed may have left locked or checkpointed.

    Raises ValueError for a damaged journal.
    """
    for kind, subject in journal.changes(journal.path_of(container)):
        if kind == journal.GPU and isinstance(subject, list):
            return [int(pid) for pid, start in subject if processes.exists(int(pid), int(start))]
    return []


def recover(container: str, listed: Callable[[], Iterable[int]], spawn: Spawn) -> list[int]:
    """Bring back what was left over; the processes that it was about. Raises GpuLost, OSError.

    The helpers and the carrier of the daemon that was killed do it by themselves: they are waited
    for.
    """
    if not left_over(container):
        return []
    private, until = f"{CONTAINERS}/{container}", time.monotonic() + BACK_S
    while journal.is_locked(private, CONTAINER_GPU_LOCK) and time.monotonic() < until:
        time.sleep(_LOOK_S)  # flock tells nobody but who waits in it, without a deadline
    if journal.is_locked(private, CONTAINER_GPU_LOCK):
        _end_orphans(f"{private}/{CONTAINER_GPU_LOCK}")
    pids = left_over(container)
    with Team(spawn) as team:
        until = time.monotonic() + BACK_S
        left = bring_back(team, pids, until) or ways.lost(container, pids, until)
        if left:
            raise kill(container, listed(), left)
    journal.note(journal.path_of(container), journal.GPU, [])
    return pids


def _end_orphans(lock: str) -> None:
    """Kill the helpers that hang: their numbers are in their lock, which only they hold."""
    with open(lock) as file:
        pids = [int(line) for line in file if line.strip().isdecimal()]
    for pid in pids:
        with contextlib.suppress(OSError):
            if os.path.samefile(f"/proc/{pid}/cwd", "/") and helper.PROGRAM.encode() in _argv(pid):
                os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + _ORPHANS_S
    private, name = os.path.split(lock)
    while journal.is_locked(private, name) and time.monotonic() < until:
        time.sleep(_LOOK_S)


def _argv(pid: int) -> list[bytes]:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read().split(b"\0")
