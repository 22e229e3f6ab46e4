"""Driver calls from outside of the process that makes them: watched, each with a deadline. Lean.

A Team has one helper (`shim.gpu.calls`) for each CUDA process, so that calls go side by side and
one that hangs holds up nobody else. A helper that dies, or is late and therefore killed, is
replaced, and the process's state decides how it goes on: the driver completes what was asked of it
whether or not anybody waits.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
import time

from shim.contract import jsontext

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any, Protocol

    class Ending(Protocol):
        """A program that was started. `end` kills and reaps it, and is idempotent."""

        def end(self) -> None: ...

    Spawn = Callable[[Sequence[str], int], Ending]
    """Starts a program that inherits one descriptor. Raises OSError."""

PROGRAM = f"{os.path.dirname(os.path.abspath(__file__))}/calls.py"
RUNNING, LOCKED, CHECKPOINTED = "running", "locked", "checkpointed"
SUCCESS, OUT_OF_MEMORY, NOT_INITIALIZED, ILLEGAL_STATE, NOT_READY = 0, 2, 3, 401, 600
NO_ANSWER = -1
_LEADS = {"lock": LOCKED, "checkpoint": CHECKPOINTED, "restore": LOCKED, "unlock": RUNNING}
_STARTS = {"lock": RUNNING, "checkpoint": LOCKED, "restore": CHECKPOINTED, "unlock": LOCKED}
_MOST_BYTES = 1 << 16
_STATE_S = 4.0
"""A state is read within a millisecond, or never; a new helper answers within 0.1 s, on a machine
that has nothing else to do.
"""
_LOOK_S = 0.05
_SCOUT = 0
"""Nobody's number: of the helper that guards nobody."""


class DriverAnswer:
    """code: the driver's CUresult, NO_ANSWER when the call did not come back. name: of the code, or
    why there is none. state: of the process, where it was read.
    """

    __slots__ = ("code", "name", "state")

    def __init__(self, code: int, name: str, state: str = "") -> None:
        self.code, self.name, self.state = code, name, state

    @property
    def is_success(self) -> bool:
        return self.code == SUCCESS

    def __repr__(self) -> str:
        return f"Answer({self.code}, {self.name!r}, {self.state!r})"


class Late(Exception):
    """A call did not come back in time; its helper is gone."""


class Died(Exception):
    """The helper ended before it answered. The message says why, as far as it could tell."""


class Helper:
    """One process that makes driver calls. Raises OSError when it cannot be started."""

    def __init__(self, spawn: Spawn) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        with its:
            argv = [sys.executable, "-ISE", PROGRAM, str(its.fileno())]
            self._child = spawn(argv, its.fileno())

    def fileno(self) -> int:
        return self._socket.fileno()

    def ask(self, request: Mapping[str, Any]) -> None:
        """Send one request; the answer is `hear`'s. Raises Died."""
        try:
            self._socket.send(json.dumps(request).encode())
        except OSError as error:
            raise Died(str(error)) from error

    def hear(self) -> dict[str, Any]:
        """The answer, when the descriptor is readable. Raises Died."""
        try:
            data = self._socket.recv(_MOST_BYTES)
        except OSError as error:
            raise Died(str(error)) from error
        found: dict[str, Any] = jsontext.parse(data) if data else {"failed": "it was killed"}
        if "failed" in found:
            raise Died(str(found["failed"]))
        return found

    def call(self, request: Mapping[str, Any], until: float) -> dict[str, Any]:
        """Ask and wait. Raises Late, Died."""
        self.ask(request)
        if not select.select([self._socket], [], [], max(0.0, until - time.monotonic()))[0]:
            raise Late(f"{request['do']} did not come back")
        return self.hear()

    def end(self) -> None:
        """Let it end by itself: what it guards it brings back, unless it was dismissed."""
        self._socket.close()

    def kill(self) -> None:
        """End it now, and leave the processes that it guards as they are."""
        self._child.end()
        self._socket.close()


class Team:
    """Helpers for some processes. Use it as a context manager: no helper outlives it.

    spawn: how a helper is started. guard_until: for a capture, when each helper brings its process
    back by itself, on `time.monotonic`; see `shim.gpu.calls`. lock: the path that it locks.
    """

    def __init__(self, spawn: Spawn, *, guard_until: float = 0.0, lock: str = "") -> None:
        self._spawn, self._guard_until, self._lock = spawn, guard_until, lock
        self._helpers: dict[int, Helper] = {}
        self.unsettled: set[int] = set()
        """Processes of which a call did not come back: the driver may still do it."""
        self._spare: list[Helper] = []

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        for helper in [*self._helpers.values(), *self._spare]:
            helper.kill()
        self._helpers, self._spare = {}, []

    def prepare(self, count: int) -> None:
        """Start helpers ahead: one takes 60 to 100 ms until it answers. Raises OSError."""
        for _ in range(count):
            self._spare.append(Helper(self._spawn))

    def state(self, pid: int, until: float) -> DriverAnswer:
        """The process's state; NOT_INITIALIZED for one that is no CUDA process.

        Asked of the process's own helper, or of one that only looks: most that are asked about
        only have the library mapped.
        """
        until = min(until, time.monotonic() + _STATE_S)
        who = pid if pid in self._helpers else _SCOUT
        try:
            return _answer(self._helper(who).call({"do": "state", "pid": pid}, until))
        except (Late, Died, OSError) as error:
            self._lose(who)
            return DriverAnswer(NO_ANSWER, f"its state cannot be read: {error}")

    def call(
        self, do: str, pids: Iterable[int], until: float, **more: object
    ) -> dict[int, DriverAnswer]:
        """Make the same call for several processes at once; every one's answer, with its state.

        until: on `time.monotonic`; a helper that is late is killed. more: `timeout_ms`, `pairs`.
        """
        waiting = list(pids)
        found: dict[int, DriverAnswer] = {}
        for pid in list(waiting):
            try:
                self._helper(pid).ask({"do": do, "pid": pid, **more})
            except (Late, Died, OSError) as error:
                self._lose(pid)
                waiting.remove(pid)
                found[pid] = self._after_loss(do, pid, str(error), until, more)
        for pid, why in self._heard(waiting, until, found):
            found[pid] = self._after_loss(do, pid, why, until, more)
        return found

    def extend(self, until: float) -> None:
        """Have the guards wait until then: all are being brought back. A guard that fired before
        has ended, and is replaced when it is needed.
        """
        self._guard_until = until
        for pid in [each for each in self._helpers if each != _SCOUT and self._lock]:
            try:
                self._tell_guard(pid)
            except (Late, Died):
                self._lose(pid)

    def dismiss(self, until: float) -> None:
        """All that were guarded run again, or are gone."""
        for pid, helper in list(self._helpers.items()):
            try:
                helper.call({"do": "dismiss"}, min(until, time.monotonic() + _STATE_S))
            except (Late, Died):
                self._lose(pid)  # and with it its lock

    def _heard(
        self, waiting: list[int], until: float, found: dict[int, DriverAnswer]
    ) -> list[tuple[int, str]]:
        """Wait for answers; those whose helper was lost on the way, and why."""
        lost: list[tuple[int, str]] = []
        while waiting:
            helpers = {self._helpers[pid]: pid for pid in waiting}
            ready = select.select(list(helpers), [], [], max(0.0, until - time.monotonic()))[0]
            for helper in ready or list(helpers):
                pid = helpers[helper]
                waiting.remove(pid)
                try:
                    if not ready:
                        raise Late("the call did not come back in time")
                    found[pid] = _answer(helper.hear())
                except (Late, Died) as error:
                    self._lose(pid)
                    lost.append((pid, str(error)))
        return lost

    def _after_loss(
        self, do: str, pid: int, why: str, until: float, more: Mapping[str, object]
    ) -> DriverAnswer:
        """Another helper goes on from what the state says."""
        again = 1
        self.unsettled.add(pid)
        while True:
            told = self.state(pid, max(until, time.monotonic() + _STATE_S))
            if told.state == _LEADS[do]:
                return DriverAnswer(SUCCESS, f"after {why}", told.state)
            if told.state != _STARTS[do] or time.monotonic() > until:
                return DriverAnswer(
                    NO_ANSWER, f"{do}: {why}; {told.state or told.name}", told.state
                )
            if again:
                again -= 1
                try:
                    request = {"do": do, "pid": pid, **more}
                    answer = _answer(self._helper(pid).call(request, until))
                except (Late, Died, OSError) as error:
                    self._lose(pid)
                    why = str(error)
                    continue
                if answer.is_success:
                    return answer
                why = answer.name
            time.sleep(_LOOK_S)  # what was asked before may still be done: nothing tells when

    def _helper(self, pid: int) -> Helper:
        if pid not in self._helpers:
            self._helpers[pid] = self._spare.pop() if self._spare else Helper(self._spawn)
            if self._lock and pid != _SCOUT:
                self._tell_guard(pid)
        return self._helpers[pid]

    def _tell_guard(self, pid: int) -> None:
        within_s = max(0.0, self._guard_until - time.monotonic())
        request = {"do": "guard", "pids": [pid], "within_s": within_s, "lock": self._lock}
        self._helpers[pid].call(request, time.monotonic() + _STATE_S)

    def _lose(self, pid: int) -> None:
        if helper := self._helpers.pop(pid, None):
            with contextlib.suppress(OSError):
                helper.kill()


def _answer(found: Mapping[str, Any]) -> DriverAnswer:
    return DriverAnswer(int(found["code"]), str(found["name"]), str(found.get("state", "")))
