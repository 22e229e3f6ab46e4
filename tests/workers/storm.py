"""Processes that change their memory in every way, while it is still being filled.

    PROCESSES=2 THREADS=3 SIZE_MIB=48 SECONDS=5 SEED=1 PORT=8000 python3 -m workers.storm

Several processes with several threads: each thread owns areas of known content (see
`workers.areas`) and runs random operations of `workers.winds`. The storm begins on request, or by
itself after a restore. The seed determines the operations that each thread wants; it does not
determine the kernel's part (addresses, the order of threads).

    /health                 200 when all memory is written
    /state                  nonce, pid, hostname, uptime_s, requests
    /storm?seconds=S&seed=N     begin
    /result                 {"done", "wrong": […], "hangs": […], "operations": {…}, "seed"}
"""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import struct
import tempfile
import threading
import time
import traceback
from typing import TYPE_CHECKING, Final

from . import areas
from .areas import PAGE, Area
from .serving import (
    Ask,
    Identity,
    Json,
    LineLog,
    Reply,
    Server,
    port_from_environment,
    restored,
    stop_on_sigterm,
)
from .winds import Wind

if TYPE_CHECKING:
    from collections.abc import Sequence

HANG_S: Final = 10.0
"""A thread that stays in an operation for this long hangs."""
DEEPEST: Final = 2
MOST_CHILDREN: Final = 2
_CHILD_S: Final = 0.6
_PARTS: Final = (0.55, 0.35, 0.1)
_GO: Final = struct.Struct("=dQ")


class Report:
    """Lines of JSON in a file that all processes append to."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def say(self, kind: str, **fields: object) -> None:
        """Write a line, at once."""
        os.write(self._fd, json.dumps({"kind": kind, **fields}).encode() + b"\n")

    def read(self) -> list[Json]:
        """Returns all lines so far."""
        with open(self.path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]


class Process:
    """A process of the storm. depth: the number of forks since a process with its own memory."""

    def __init__(self, report: Report, name: str, owned: list[Area], depth: int = 0) -> None:
        self.report, self.name, self.owned, self.depth = report, name, owned, depth
        self.seed = 0
        self.market: collections.deque[Area] = collections.deque()
        self.winds: list[Wind] = []
        self.is_over = False
        self.failed = False
        self._children: dict[int, float] = {}
        self._forked = 0

    # Life

    def storm(self, seed: int, seconds: float, threads: int) -> int:
        """Storm, then check all that is left. Returns the exit status."""
        self.seed = seed
        chance = random.Random(f"{seed} {self.name}")  # noqa: S311
        running = self._begin(threads, time.monotonic() + seconds)
        if self.depth and (ends := chance.random()) < 0.4:
            time.sleep(seconds * chance.random())
            if ends < 0.15:
                os.kill(os.getpid(), signal.SIGKILL)
            return 1 if self.failed else 0  # the threads are in the middle of an operation
        for thread in running:
            thread.join()
        while self._children:
            time.sleep(0.01)
        self.is_over = True
        self._finish(chance.random())
        return 1 if self.failed else 0

    def _begin(self, threads: int, until: float) -> list[threading.Thread]:
        self.winds = [
            Wind(self, f"{self.name}.{number}", self.owned[number::threads])
            for number in range(threads)
        ]
        running = [
            threading.Thread(target=wind.blow, args=(until,), daemon=True) for wind in self.winds
        ]
        threading.Thread(target=self._watch, daemon=True).start()
        for thread in running:
            thread.start()
        return running

    def _finish(self, thorough: float) -> None:
        wind = Wind(self, f"{self.name}.end", [])
        try:
            for area in self._left():
                wind.doing, wind.since = "the last check", time.monotonic()
                area.verify(0, len(area) if not self.depth or thorough < 0.3 else 1)
        except areas.Wrong as error:
            self.wrong(wind, error)
        done = sum((wind.done for wind in self.winds), collections.Counter[str]())
        self.report.say("done", process=self.name, operations=done)

    def _left(self) -> list[Area]:
        return [*self.market, *(area for wind in self.winds for area in wind.areas)]

    # Children

    def fork(self, wind: Wind) -> None:
        """Fork, called by a thread. The child takes over all areas that no thread is working on."""
        if self.depth >= DEEPEST or len(self._children) >= MOST_CHILDREN:
            return
        self._forked += 1
        name = f"{wind.name}/{self._forked}"
        wind.note(f"fork {name}")
        if pid := os.fork():
            self.expect(pid)
            return
        code = 3
        try:
            code = self._child(name)
        except BaseException:  # noqa: BLE001 - a child must never run the parent's code
            self.report.say("wrong", process=name, error=traceback.format_exc())
        os._exit(code)

    def _child(self, name: str) -> int:
        moving = [wind.moving for wind in self.winds if wind.moving]
        child = Process(self.report, name, self._left(), self.depth + 1)
        child.seed = self.seed
        witness = Wind(child, f"{name}.first", [])
        recent = {each.name: list(each.recent)[-6:] for each in self.winds}
        try:
            for area, to in moving:
                if _is_readable(to):
                    area.address = to
                witness.note(f"moving {area.address:#x} {len(area)} {to:#x}")
                area.verify()
                child.owned.append(area)
            full = witness.chance.random() < 0.4
            for area in child.owned:
                witness.note(f"inherited {area.address:#x} {len(area)}")
                area.verify(0, len(area) if full else 1)
        except areas.Wrong as error:
            child.wrong(witness, error, recent)
            return 1
        return child.storm(
            self.seed, _CHILD_S * witness.chance.random(), witness.chance.randint(1, 2)
        )

    def expect(self, pid: int) -> None:
        """Expect that a child ends by itself."""
        self._children[pid] = time.monotonic() + HANG_S + 5 * _CHILD_S

    # Failures

    def wrong(self, wind: Wind, error: Exception, more: object = None) -> None:
        """Report a failure, and end this process."""
        self.failed = self.is_over = True
        told = str(error) if isinstance(error, areas.Wrong) else traceback.format_exc()
        self.report.say(
            "wrong", process=self.name, thread=wind.name, seed=self.seed, error=told,
            doing=wind.doing, recent=list(wind.recent), at=time.monotonic(),
            others=more or {each.name: list(each.recent)[-8:] for each in self.winds},
        )  # fmt: skip

    def _watch(self) -> None:
        """Reap children, and notice threads and children that hang. Body of a thread."""
        while not (self.is_over and not self._children):
            now = time.monotonic()
            for wind in self.winds:
                if wind.doing and now - wind.since > HANG_S:
                    self._hangs(f"thread {wind.name}: {wind.doing}", os.getpid(), wind)
            for pid, deadline in list(self._children.items()):
                if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    self._reap(pid)
                elif now > deadline:
                    self._hangs(f"process {pid}, a child", pid, None)
            time.sleep(0.02)

    def _reap(self, pid: int) -> None:
        _, status = os.waitpid(pid, 0)
        del self._children[pid]
        if os.waitstatus_to_exitcode(status) not in (0, -signal.SIGKILL):
            self.failed = True
            if os.waitstatus_to_exitcode(status) != 1:  # with 1 the child has reported by itself
                self.report.say("wrong", process=self.name, error=f"a child ended with {status}")

    def _hangs(self, what: str, pid: int, wind: Wind | None) -> None:
        recent = list(wind.recent) if wind else []
        self.report.say(
            "hang", process=self.name, what=what, seed=self.seed, recent=recent,
            where=waiting(pid), at=time.monotonic(),
        )  # fmt: skip
        for child in self._children:
            os.kill(child, signal.SIGKILL)
        os._exit(4)


def waiting(pid: int) -> dict[str, str]:
    """Returns the place in the kernel where each thread of a process waits."""
    found = {}
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{task}/stack", encoding="ascii") as file:
                found[task] = " ".join(line.split()[1] for line in file.read().splitlines()[:4])
        except OSError as error:
            found[task] = error.strerror or ""
    return found


def _is_readable(address: int) -> bool:
    with open("/proc/self/maps", encoding="utf-8") as file:
        for line in file:
            start, end = (int(each, 16) for each in line.split()[0].split("-"))
            if start <= address < end:
                return line.split()[1].startswith("r")
    return False


def filled(number: int, size_mib: int, seed: int) -> tuple[list[Area], list[tuple[int, int]]]:
    """Make memory with content. Returns areas, and their regions (address and end)."""
    chance = random.Random(f"memory {seed} {number}")  # noqa: S311
    owned, regions = [], []
    label = (number + 1) << 57
    for part in _PARTS:
        pages = int(size_mib * 256 * part)
        address = areas.mapped(pages)
        regions.append((address, address + pages * PAGE))
        while pages:
            size = min(pages, chance.choice((4, 16, 33, 64, 128, 200)))
            area = Area(address, [0] * size)
            for page in range(size):
                label += 1
                if chance.random() < 0.9:
                    area.write(page, [label])
            owned.append(area)
            address, pages = address + size * PAGE, pages - size
    chance.shuffle(owned)
    return owned, regions


class Worker:
    """The endpoints, and the processes. Pid 1 has no part in the storm: it reports."""

    def __init__(self) -> None:
        self.me, self.log = Identity("storm"), LineLog()
        self.report = Report(tempfile.mkstemp(prefix="storm-", suffix=".report")[1])
        self.seconds = float(os.environ.get("SECONDS", "5"))
        self.seed = int(os.environ.get("SEED", "1"))
        self.threads = int(os.environ.get("THREADS", "3"))
        self.go, self.ready = os.pipe(), os.pipe()
        self.running: list[int] = []
        self.begun = False
        for number in range(int(os.environ.get("PROCESSES", "2"))):
            self.running.append(self._forked(number, int(os.environ.get("SIZE_MIB", "48"))))

    def _forked(self, number: int, size_mib: int) -> int:
        if pid := os.fork():
            return pid
        code = 3
        try:
            owned, _ = filled(number, size_mib, self.seed)
            process = Process(self.report, f"p{number}", owned)
            os.write(self.ready[1], b".")
            seconds, seed = _GO.unpack(os.read(self.go[0], _GO.size))
            code = process.storm(seed, seconds, self.threads)
        except BaseException:  # noqa: BLE001 - the child must never run the parent's code
            self.report.say("wrong", process=f"p{number}", error=traceback.format_exc())
        os._exit(code)

    def begin(self, seconds: float, seed: int) -> None:
        """Begin the storm, once."""
        if not self.begun:
            self.begun, self.seed = True, seed
            os.write(self.go[1], _GO.pack(seconds, seed) * len(self.running))

    def storm(self, ask: Ask) -> Json:
        """Begin the storm."""
        self.begin(ask.number("seconds", self.seconds), ask.whole("seed", self.seed))
        return {"seed": self.seed}

    def result(self, _: Ask) -> Json:
        """Returns the findings so far."""
        for pid in list(self.running):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                self.running.remove(pid)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                if status not in (0, 1, 4):  # these have reported by themselves
                    self.report.say("wrong", error=f"process {pid} ended with {status}")
        return {"done": not self.running, "seed": self.seed, **summary(self.report.read())}

    def run(self) -> None:
        """Serve, and begin the storm when this process is restored."""
        told = 0
        while told < len(self.running):
            told += len(os.read(self.ready[0], 16))
        routes = {
            "/health": lambda _: Reply(200, {"ok": True}),
            "/state": lambda _: self.me.describe(),
            "/storm": self.storm,
            "/result": self.result,
        }
        Server("0.0.0.0", port_from_environment(), routes, self.log, self.me).start()  # noqa: S104
        stop_on_sigterm(self.log)
        self.log.say(f"ready {len(self.running)} processes")
        while not restored():
            time.sleep(0.01)
        self.begin(self.seconds, time.time_ns() & 0xFFFFFFFF)
        threading.Event().wait()


def summary(lines: Sequence[Json]) -> Json:
    """Returns the sums of a report."""
    done: collections.Counter[str] = collections.Counter()
    for line in lines:
        operations = line.get("operations")
        if isinstance(operations, dict):
            done.update(operations)
    return {
        "wrong": [line for line in lines if line["kind"] == "wrong"],
        "hangs": [line for line in lines if line["kind"] == "hang"],
        "operations": dict(sorted(done.items())),
    }


if __name__ == "__main__":
    Worker().run()
