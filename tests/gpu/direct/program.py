"""The program under test, with the library preloaded, and what is noted about it."""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from shim.kernel import procfs


class Program:
    """pid: of the process, which CRIU may have made again. found: for the report."""

    def __init__(self, argv: list[str], library: str) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="program-"))
        words = [str(self.home) if word == "STATUS" else word for word in argv]
        environment = {**os.environ, **({"LD_PRELOAD": library} if library else {})}
        self.began = time.monotonic()
        with (self.home / "log").open("wb") as log:
            self._child: subprocess.Popen[bytes] | None = subprocess.Popen(
                words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, cwd=self.home,
            )  # fmt: skip
        self.pid = self._child.pid
        self.found: dict[str, Any] = {"program": words, "rounds": 0}

    def status(self) -> dict[str, Any]:
        """Returns the program's last status; empty when there is none."""
        with contextlib.suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads((self.home / "status").read_text())
            return found
        return {}

    def ready(self, within_s: float) -> dict[str, Any]:
        """When it has answered for the first time."""
        self.found["before"] = self.more({"answers": 0}, within_s)
        self.found["ready_s"] = round(time.monotonic() - self.began, 2)
        return self.status()

    def more(self, than: dict[str, Any], within_s: float) -> dict[str, Any]:
        """When it has answered since. Raises RuntimeError."""
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            now = self.status()
            if now.get("answers", 0) > than.get("answers", 0):
                return now
            if not self.alive():
                raise RuntimeError(f"the program has ended: {now}")
            time.sleep(0.002)
        raise RuntimeError(f"no answer in {within_s} s: {self.status()}")

    def right(self, status: dict[str, Any]) -> None:
        """Raises RuntimeError when it was wrong."""
        self.found["after"] = status
        if status.get("wrong") or status.get("errors"):
            raise RuntimeError(f"wrong: {status}")

    def failed(self, error: Exception, step: str) -> None:
        """Note it, and where the threads are."""
        self.found["failed"] = f"{type(error).__name__} in {step!r}: {error}"[:800]
        self.found["after"] = self.status()
        self.found["threads"] = self._threads()

    def alive(self) -> bool:
        """Whether the process runs."""
        if self._child is not None:
            return self._child.poll() is None
        with contextlib.suppress(OSError):
            return procfs.state(self.pid) != "Z"
        return False

    def gone(self) -> None:
        """After it was killed: its pid is free when this returns."""
        if self._child is not None:
            self._child.wait(20)
            self._child = None
        until = time.monotonic() + 20
        while Path(f"/proc/{self.pid}").exists() and time.monotonic() < until:
            time.sleep(0.002)

    def _threads(self) -> list[str]:
        found = []
        with contextlib.suppress(OSError):
            for tid in procfs.threads(self.pid):
                with contextlib.suppress(OSError):
                    at = Path(f"/proc/{self.pid}/task/{tid}")
                    words = [(at / name).read_text().strip() for name in ("comm", "wchan")]
                    found.append(" ".join([*words, (at / "syscall").read_text()[:40].strip()]))
        return found[-20:]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        (self.home / "stop").touch()
        until = time.monotonic() + 10
        while self.alive() and time.monotonic() < until:
            time.sleep(0.01)
        self.found["ended"] = "killed" if self.alive() else "by itself"
        if self._child is not None:
            self.found["ended"] = self._child.poll()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.gone()
        self.found["log"] = (self.home / "log").read_text(errors="replace")[-1500:]


class Rows:
    """Seconds of the steps of many rounds, by kind."""

    def __init__(self) -> None:
        self._rows: dict[str, list[dict[str, float]]] = {}

    def add(self, kind: str, took: dict[str, float]) -> None:
        """One round."""
        self._rows.setdefault(kind, []).append(dict(took))

    def summary(self) -> dict[str, dict[str, list[float]]]:
        """Of each step: median, least, most."""
        return {kind: self._of(rows) for kind, rows in self._rows.items()}

    def _of(self, rows: list[dict[str, float]]) -> dict[str, list[float]]:
        found = {}
        for name in {name: None for row in rows for name in row}:
            values = sorted(row[name] for row in rows if name in row)
            found[name] = [round(statistics.median(values), 4), values[0], values[-1]]
        return found
