"""Long-running programs of a test node, started and stopped as systemd would.

systemd itself does not run here. This module reads a unit file for the facts of its main process:
ExecStart, Environment, Type=notify, the directories. The service's output goes to a journal file.
"""

import os
import shlex
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, Self

from tests.node.enclosure import Enclosure

NOTIFY_SOCKET: Final = "/run/systemd/notify"
START_WITHIN_S: Final = 30.0
STOP_WITHIN_S: Final = 30.0


class ServiceFailed(Exception):
    """A service ended or did not get ready. The message ends with the last lines of its journal."""


@dataclass(frozen=True, slots=True)
class Unit:
    """The settings of a unit file that this module honours. Source: systemd.service(5),
    systemd.exec(5).
    """

    name: str
    exec_start: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    notify: bool = False
    umask: int = 0o022
    runtime_directories: tuple[str, ...] = ()
    state_directories: tuple[str, ...] = ()

    @classmethod
    def parse(cls, name: str, text: str) -> Self:
        """Read a unit file's [Service] section. Skips settings that this class does not name."""
        values: dict[str, list[str]] = {}
        section = ""
        for line in text.replace("\\\n", " ").splitlines():
            if line.startswith("["):
                section = line.strip()
            elif section == "[Service]" and "=" in line and not line.startswith(("#", ";")):
                key, _, value = line.partition("=")
                values.setdefault(key.strip(), []).append(value.strip())
        pairs = [pair for line in values.get("Environment", ()) for pair in shlex.split(line)]
        return cls(
            name,
            tuple(shlex.split(values["ExecStart"][-1].lstrip("@-:+!"))),
            dict(pair.split("=", 1) for pair in pairs),
            values.get("Type", ["simple"])[-1] == "notify",
            int(values.get("UMask", ["0022"])[-1], 8),
            tuple(" ".join(values.get("RuntimeDirectory", ())).split()),
            tuple(" ".join(values.get("StateDirectory", ())).split()),
        )


class Service:
    """A unit on a node: start, stop, kill, and its output."""

    def __init__(self, node: Enclosure, unit: Unit) -> None:
        self.unit = unit
        self.pid = -1
        """Returns the main process as the host sees it, -1 while stopped."""
        self._node = node
        self._process: subprocess.Popen[Any] | None = None

    @property
    def running(self) -> bool:
        """Returns whether the main process is there."""
        return self._process is not None and self._process.poll() is None

    @property
    def _journal(self) -> Path:
        return self._node.kept(f"{self.unit.name}.journal")

    def journal(self) -> str:
        """Returns all standard output and error of the service, over all its starts."""
        return self._journal.read_text(errors="replace") if self._journal.exists() else ""

    def start(self, *, ready: Callable[[], None] | None = None) -> None:
        """Start the service, and wait until it reports readiness, or until `ready` returns.

        Raises ServiceFailed.
        """
        if self.running:
            raise ServiceFailed(f"{self.unit.name} runs already")
        for directory in self.unit.runtime_directories:
            self._node.path(f"/run/{directory}").mkdir(mode=0o700, parents=True, exist_ok=True)
        for directory in self.unit.state_directories:
            self._node.path(f"/var/lib/{directory}").mkdir(mode=0o700, parents=True, exist_ok=True)
        with ExitStack() as stack:
            journal = stack.enter_context(self._journal.open("ab"))
            told = stack.enter_context(_notify_socket(self._node)) if self.unit.notify else None
            self._spawn(journal)
            try:
                if told is not None:
                    self._await_ready(told)
                if ready is not None:
                    ready()
            except BaseException:
                self.kill()
                raise

    def _spawn(self, journal: IO[bytes]) -> None:
        read_fd, write_fd = os.pipe()
        environment = dict(self.unit.environment)
        if self.unit.notify:
            environment["NOTIFY_SOCKET"] = NOTIFY_SOCKET
        with open(read_fd, "rb") as report:
            try:
                self._process = self._node.popen(
                    self.unit.exec_start,
                    environment=environment,
                    report_fd=write_fd,
                    umask=self.unit.umask,
                    stdin=subprocess.DEVNULL,
                    stdout=journal,
                    stderr=journal,
                )
            finally:
                os.close(write_fd)
            line = report.readline()
        if not line:
            raise ServiceFailed(f"{self.unit.name} could not be started:\n{self.tail()}")
        self.pid = int(line)

    def _await_ready(self, told: socket.socket) -> None:
        """Wait for READY=1. Source: sd_notify(3)."""
        assert self._process is not None
        told.settimeout(0.2)  # interval of the check that the service has not died
        for _ in range(int(START_WITHIN_S / 0.2)):
            try:
                if b"READY=1" in told.recv(65536).splitlines():
                    return
            except TimeoutError:
                if self._process.poll() is not None:
                    raise ServiceFailed(
                        f"{self.unit.name} ended with {self._process.returncode} before it was "
                        f"ready:\n{self.tail()}"
                    ) from None
        raise ServiceFailed(f"{self.unit.name} is not ready:\n{self.tail()}")

    def stop(self) -> int:
        """Send SIGTERM, and SIGKILL after a while. Returns the exit status, 128+N for a signal."""
        if self._process is None:
            return 0
        if self.running:
            os.kill(self.pid, signal.SIGTERM)
        try:
            self._process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            return self.kill()
        return self._ended()

    def kill(self) -> int:
        """Send SIGKILL to the main process, like a crash."""
        if self._process is None:
            return 0
        if self.running and self.pid > 0:
            os.kill(self.pid, signal.SIGKILL)
        return self._ended()

    def _ended(self) -> int:
        assert self._process is not None
        status = self._process.wait(STOP_WITHIN_S)
        self._process, self.pid = None, -1
        return int(status)

    def tail(self, lines: int = 30) -> str:
        """Returns the end of the journal."""
        return "\n".join(self.journal().splitlines()[-lines:])


def _notify_socket(node: Enclosure) -> socket.socket:
    path = node.path(NOTIFY_SOCKET)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    made.bind(str(path))
    return made


def read_unit(node: Enclosure, path: str) -> Unit:
    """Returns the unit file that is installed on the node at `path`."""
    return Unit.parse(Path(path).stem, node.path(path).read_text())


def apply_tmpfiles(node: Enclosure, path: str) -> None:
    """Make the directories of a tmpfiles.d(5) file; skips its other kinds of lines."""
    for line in node.path(path).read_text().splitlines():
        fields = line.split()
        if fields and fields[0] == "d":
            directory = node.path(fields[1])
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(int(fields[2], 8))
