"""Takes the device memory of a process that is asked without pause away and gives it back, often.

`python3 -m tests.gpu.direct.loop --rounds 50 --mode files,keep --control DIR --out FILE -- PROGRAM…`
starts PROGRAM with the library preloaded and `STATUS` in its arguments replaced by a directory in
which it writes `status`: a JSON object with `answers`, `wrong`, `errors`, `interrupted`. Mode `keep`
gives the same memory back; `files` saves it, lets it go, and fills new memory from the files.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shim.gpu.direct import mover
from shim.gpu.direct.device import Driver, Gpu, Memory, processors
from shim.gpu.direct.mover import Move, Ring
from shim.gpu.direct.session import Door, Refused, Session
from tests.gpu.children import Helper

STEP_S = 30.0


class Status:
    """What the program says of itself."""

    def __init__(self, directory: Path, child: subprocess.Popen[bytes]) -> None:
        self._path, self._child = directory / "status", child

    def read(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads(self._path.read_text())
            return found
        return {}

    def ready(self, within_s: float) -> dict[str, Any]:
        return self.more({"answers": 0}, within_s)

    def more(self, than: dict[str, Any], within_s: float) -> dict[str, Any]:
        """When it has answered since. Raises RuntimeError."""
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            now = self.read()
            if now.get("answers", 0) > than.get("answers", 0):
                return now
            if self._child.poll() is not None:
                raise RuntimeError(f"the program has ended: {self._child.returncode} {now}")
            time.sleep(0.01)
        raise RuntimeError(f"no answer in {within_s} s: {self.read()}")


class Timer:
    """Seconds of each step, in order."""

    def __init__(self) -> None:
        self.took: dict[str, float] = {}
        self.now = "start"

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.now = name
        began = time.perf_counter()
        yield
        self.took[name] = round(time.perf_counter() - began, 5)


class Host:
    """The host's side of one round."""

    def __init__(self, control: Path, files: Path, helper: Helper, checkpoint: bool) -> None:
        self._dirfd = os.open(control, os.O_DIRECTORY)
        self.door = Door(self._dirfd)
        self.files, self.helper, self.checkpoint = files, helper, checkpoint
        self.driver = Driver()
        self.gpus: dict[bytes, tuple[Gpu, Ring]] = {}

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

    def lent(
        self, session: Session, until: float
    ) -> tuple[list[int], list[int], list[Memory], bytes]:
        numbers, fds, memory, uuid = [], [], [], b""
        for batch in session.lend(until):
            for piece in batch:
                uuid = piece.uuid
                numbers.append(piece.number)
                fds.append(piece.fd)
                memory.append(self.gpu(uuid)[0].imported(piece.fd, piece.octets))
        return numbers, fds, memory, uuid

    def round(self, pid: int, mode: str, timer: Timer) -> dict[str, Any]:
        until = time.monotonic() + 2 * STEP_S
        began = time.perf_counter()
        with timer.step("call"):
            session = self.door.call(pid, until)
        with session:
            with timer.step("close"):
                self.close(session, until)
            with timer.step("lock"):
                self.call(pid, "lock", timeout_ms=5000)
            with timer.step("unlock"):
                self.call(pid, "unlock")
            with timer.step("lend"):
                numbers, fds, memory, uuid = self.lent(session, until)
            with timer.step("drop"):
                session.drop(until)
        size = sum(m.octets for m in memory)
        if mode == "files":
            with timer.step("save"):
                self.save(uuid, memory)
            close_all(memory, fds)
        self.driver_steps(pid, timer)
        if mode == "files":
            with timer.step("make"):
                memory = [self.gpu(uuid)[0].created(m.octets) for m in memory]
            with timer.step("load"):
                self.load(uuid, memory)
            fds = [m.export() for m in memory]
        with timer.step("call again"):
            session = self.door.call(pid, until)
        with session:
            with timer.step("fill"):
                away, _ = session.fill(
                    zip(numbers, fds, strict=True), own=True, until=until
                )
            if away:
                raise RuntimeError(f"{away} pieces are away")
            with timer.step("open"):
                session.open_gate(until)
        stopped = time.perf_counter() - began
        close_all(memory, fds)
        return {"stopped": round(stopped, 4), "octets": size, "pieces": len(numbers)}

    def close(self, session: Session, until: float) -> None:
        for _ in range(5):
            try:
                session.close_gate(3.0, 20.0, until)
            except Refused as busy:
                print("busy:", busy, flush=True)
            else:
                return
        raise RuntimeError("the gate does not close")

    def driver_steps(self, pid: int, timer: Timer) -> None:
        if not self.checkpoint:
            return
        for do in ("lock", "checkpoint", "restore", "unlock"):
            with timer.step(f"driver {do}"):
                self.call(pid, do, **({"timeout_ms": 5000} if do == "lock" else {}))

    def save(self, uuid: bytes, memory: list[Memory]) -> None:
        with self.opened(os.O_RDWR | os.O_CREAT) as fds:
            move = Move(self.gpu(uuid)[1], memory, fds)
            move.save(mover.layout([m.octets for m in memory]))

    def load(self, uuid: bytes, memory: list[Memory]) -> None:
        with self.opened(os.O_RDONLY) as fds:
            Move(self.gpu(uuid)[1], memory, fds).load(mover.layout([m.octets for m in memory]))

    @contextlib.contextmanager
    def opened(self, flags: int) -> Iterator[list[int]]:
        with contextlib.ExitStack() as stack:
            fds = []
            for number in range(mover.FILES):
                fds.append(os.open(self.files / mover.name(number), flags, 0o600))
                stack.callback(os.close, fds[-1])
            yield fds


def close_all(memory: list[Memory], fds: list[int]) -> None:
    for each in memory:
        each.close()
    for fd in fds:
        os.close(fd)
    fds.clear()


def summary(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    """Of each step: median, least, most."""
    names = {name: None for row in rows for name in row}
    found = {}
    for name in names:
        values = sorted(row[name] for row in rows if name in row)
        found[name] = [round(statistics.median(values), 4), values[0], values[-1]]
    return found


def run(options: argparse.Namespace, program: list[str]) -> dict[str, Any]:
    home = Path(tempfile.mkdtemp(prefix="loop-"))
    argv = [str(home) if word == "STATUS" else word for word in program]
    environment = {**os.environ, "LD_PRELOAD": options.library} if options.library else None
    log = (home / "log").open("wb")
    began = time.perf_counter()
    child = subprocess.Popen(argv, env=environment, stdout=log, stderr=log)
    found: dict[str, Any] = {"program": program, "modes": options.mode, "rounds": 0}
    rows: dict[str, list[dict[str, float]]] = {}
    timer = Timer()
    status = Status(home, child)
    try:
        found["before"] = status.ready(120)
        found["ready_s"] = round(time.perf_counter() - began, 2)
        if found["before"].get("errors"):
            raise RuntimeError(f"errors before anything was done: {found['before']}")
        with Helper(fake=False) as helper:
            host = Host(
                Path(options.control), Path(options.files), helper, not options.no_checkpoint
            )
            modes = options.mode.split(",")
            for number in range(options.rounds):
                if time.perf_counter() - began > options.seconds:
                    break
                before = status.read()
                timer = Timer()
                mode = modes[number % len(modes)]
                about = host.round(child.pid, mode, timer)
                after = status.more(before, 20)
                found.update(
                    rounds=number + 1, after=after, octets=about["octets"], pieces=about["pieces"]
                )
                timer.took["stopped"] = about["stopped"]
                rows.setdefault(mode, []).append(timer.took)
                if after.get("wrong") or after.get("errors"):
                    raise RuntimeError(f"wrong after round {number + 1}: {after}")
                time.sleep(options.pause)
            time.sleep(0.5)
            found["after"] = status.more(status.read(), 20)
    except Exception as error:  # noqa: BLE001 - told
        found["failed"] = f"{type(error).__name__} in {timer.now!r}: {error}"[:800]
        found["after"] = status.read()
        found["threads"] = stacks(child.pid)
    finally:
        found["steps"] = {mode: summary(each) for mode, each in rows.items()}
        (home / "stop").touch()
        try:
            found["ended"] = child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            found["ended"] = "killed"
        found["log"] = (home / "log").read_text(errors="replace")[-1500:]
    return found


def stacks(pid: int) -> list[str]:
    """Where its threads wait."""
    found = []
    with contextlib.suppress(OSError):
        for tid in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                at = Path(f"/proc/{pid}/task/{tid}")
                found.append(f"{(at / 'comm').read_text().strip()} {(at / 'wchan').read_text()} {(at / 'syscall').read_text().strip()[:60]}")  # fmt: skip
    return found


def main() -> None:
    mine, program = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--pause", type=float, default=0.05)
    parser.add_argument("--mode", default="keep")
    parser.add_argument("--control", default="/run/quickthaw")
    parser.add_argument("--files", default="/dev/shm")
    parser.add_argument("--library", default="")
    parser.add_argument("--no-checkpoint", action="store_true")
    print(json.dumps(run(parser.parse_args(mine), program)), flush=True)


if __name__ == "__main__":
    main()
