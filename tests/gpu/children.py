"""The processes that the probe starts: processes under test, and the helper that calls the driver.

Every wait has a limit, and a process that does not answer is killed and left: one that is stuck in
the driver cannot be waited for.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final, Self

from shim.kernel import procfs

ROOT: Final = Path(__file__).parents[2]
PR_SET_PDEATHSIG: Final = 1
POLL_S: Final = 0.002


def environment() -> dict[str, str]:
    """The caller's, with our modules to be found."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def die_with_parent() -> None:
    """In a child before it becomes its program."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Worker:
    """A process under test, by pid: started here, or restored by CRIU with the same `home`."""

    def __init__(self, home: Path, pid: int, child: subprocess.Popen[bytes] | None) -> None:
        self.home, self.pid, self._child = home, pid, child
        self.ready: dict[str, Any] = {}
        self._asked = 0

    @classmethod
    def start(
        cls, argv: list[str], scratch: Path, *, timeout_s: float, **variables: str
    ) -> "Worker":
        """`HOME` in `argv` becomes its directory. Raises RuntimeError when it is not ready."""
        home = Path(tempfile.mkdtemp(prefix="worker-", dir=scratch))
        words = [str(home) if word == "HOME" else word for word in argv]
        with (home / "log").open("wb") as log:
            child = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=home,
                env=environment() | variables,
                start_new_session=True,  # no pdeathsig: CRIU restores it, and then its parent ends
            )
        worker = cls(home, child.pid, child)
        worker.await_ready(timeout_s)
        return worker

    def await_ready(self, timeout_s: float) -> None:
        """Start the program; `ready` has its description of itself. Raises RuntimeError; the
        program is then dead.
        """
        self.ready = self._wait(0, timeout_s)
        if not self.ready.get("ready"):
            self.kill()
            log = self.home / "log"
            tail = log.read_text(errors="replace")[-600:] if log.exists() else ""
            raise RuntimeError(f"not ready: {self.ready} {tail}")

    def ask(self, words: str, timeout_s: float = 60) -> dict[str, Any]:
        """Its answer; `error` says that there was none."""
        self._asked += 1
        (self.home / "ask.new").write_text(words)
        (self.home / "ask.new").rename(self.home / f"ask.{self._asked}")
        return self._wait(self._asked, timeout_s)

    def check(self, timeout_s: float = 60) -> dict[str, Any]:
        """Whether its payload and features are, bit for bit, what they were."""
        return self.ask("check", timeout_s)

    def restored(self, pid: int, home: Path | None = None) -> "Worker":
        """The same worker as CRIU made it again, with as many questions answered."""
        again = Worker(home or self.home, pid, None)
        again._asked = self._asked
        return again

    def _wait(self, number: int, timeout_s: float) -> dict[str, Any]:
        until = time.monotonic() + timeout_s
        path = self.home / f"reply.{number}"
        while not path.exists():
            if not self.alive():
                return {"error": "the process is gone"}
            if time.monotonic() > until:
                return {"error": f"no answer in {timeout_s} s"}
            time.sleep(POLL_S)
        answer: dict[str, Any] = json.loads(path.read_text())
        return answer

    def alive(self) -> bool:
        """Whether it runs; a zombie does not."""
        if self._child is not None:
            return self._child.poll() is None
        with contextlib.suppress(OSError):
            return procfs.state(self.pid) != "Z"
        return False

    def await_end(self) -> None:
        """After CRIU has killed a restored one: whoever is its parent has to reap it."""
        until = time.monotonic() + 10
        while Path(f"/proc/{self.pid}").exists() and time.monotonic() < until:
            time.sleep(POLL_S)

    def kill(self) -> float:
        """SIGKILL; returns the seconds until it was gone, 20 when it never was."""
        started = time.monotonic()
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        while self.alive() and time.monotonic() < started + 20:
            time.sleep(POLL_S)
        return round(time.monotonic() - started, 3)

    def reap(self) -> None:
        """After CRIU has killed it: its pid must be free for the restore."""
        if self._child is not None:
            self._child.wait(20)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()


class Helper:
    """The process that calls the driver. `started` is its first line, `start_ms` what that took."""

    def __init__(self, *, fake: bool, init: bool = True) -> None:
        started = time.monotonic()
        command = [sys.executable, "-m", "tests.gpu.helper", *(["--fake"] if fake else [])]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment(),
            preexec_fn=die_with_parent,
        )
        self.started = self._answer(30)
        self.start_ms = round((time.monotonic() - started) * 1000, 1)
        self.init = self.do("init") if init else {}

    @property
    def pid(self) -> int:
        return self._process.pid

    def do(self, what: str, pid: int = 0, *, timeout_s: float = 180, **more: Any) -> dict[str, Any]:
        """One driver call: `code` 0 and `ms`. After `timeout_s` the helper is killed: code -1."""
        request = json.dumps({"do": what, "pid": pid, **more})
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(request.encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            return {"code": -1, "name": f"the helper is gone: {error}", "ms": 0.0}
        return self._answer(timeout_s)

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        until = time.monotonic() + timeout_s
        while (left := until - time.monotonic()) > 0:
            if select.select([self._process.stdout], [], [], left)[0]:
                line = self._process.stdout.readline()
                if line:
                    answer: dict[str, Any] = json.loads(line)
                    return answer
                return {"code": -1, "name": f"the helper died: {self._process.wait()}", "ms": 0.0}
        self._process.kill()
        return {"code": -1, "name": f"no answer in {timeout_s} s", "ms": timeout_s * 1000}

    def state(self, pid: int) -> str:
        """running, locked, checkpointed, failed, or the error's name."""
        answer = self.do("state", pid, timeout_s=10)
        return str(answer.get("state") or answer.get("name"))

    def freeze(self, pid: int) -> dict[str, Any]:
        """Lock and checkpoint."""
        locked = self.do("lock", pid, timeout_ms=20_000)
        return {"lock": locked, "checkpoint": self.do("checkpoint", pid), "state": self.state(pid)}

    def thaw(self, pid: int) -> dict[str, Any]:
        """Restore and unlock."""
        restored = self.do("restore", pid)
        return {"restore": restored, "unlock": self.do("unlock", pid), "state": self.state(pid)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)


def background(argv: list[str]) -> subprocess.Popen[bytes]:
    """A program that runs until it is killed, or we end."""
    nowhere = subprocess.DEVNULL
    return subprocess.Popen(
        argv, stdin=nowhere, stdout=nowhere, stderr=nowhere, preexec_fn=die_with_parent
    )


def run(argv: list[str], timeout_s: float, **options: Any) -> subprocess.CompletedProcess[str]:
    """A program that ends; 124 when it did not in time. Its output is text."""
    options = {"capture_output": True, "text": True, "check": False, **options}
    try:
        done: subprocess.CompletedProcess[str] = subprocess.run(argv, timeout=timeout_s, **options)
    except subprocess.TimeoutExpired as late:
        parts = [(part or b"").decode(errors="replace") for part in (late.stdout, late.stderr)]
        return subprocess.CompletedProcess(argv, 124, *parts)
    except OSError as error:
        return subprocess.CompletedProcess(argv, 127, "", str(error))
    return done
