"""The namespaces and cgroups of a test node: processes, files and connections.

Leaving the `with` kills the node's init, and so every process of the node.
"""

import contextlib
import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Self

from shim.kernel import procfs
from tests.node import base, cgroups, kernel, runs

HERE: Final = Path(__file__).parent
ENTER: Final = str(HERE / "enter.py")
UP_WITHIN_S: Final = 30.0
RETRY_EVERY_S: Final = 0.005
ON_DISK: Final = {
    "containerd": "/var/lib/containerd",
    "kubelet": "/var/lib/kubelet",
    "pods": "/var/log/pods",
    "quickthaw": "/var/lib/quickthaw",
}
"""Directories outside of the node's overlay: an overlay's upperdir cannot lie on another overlay.
"""
ENVIRONMENT: Final = {
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
}


class CommandFailed(Exception):
    """A command in the node ended with another status than 0. `done` has the command's output."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        command = " ".join(done.args)
        super().__init__(f"`{command}` ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        self.done = done


class CommandStuck(Exception):
    """A command in the node did not end in time. The message has the activity of each process of
    it.
    """

    def __init__(self, node: "Enclosure", pid: int, argv: Sequence[str], timeout_s: float) -> None:
        found = "\n".join(_doing(each) for each in (pid, *_children(pid)))
        super().__init__(f"`{' '.join(argv)}` in {node.name} ran for {timeout_s} s:\n{found}")


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """The answer of a server in the node's network."""

    status: int
    body: bytes

    def json(self) -> Any:
        """Returns the body, parsed."""
        return json.loads(self.body)


class Enclosure:
    """A Debian `suite` in namespaces of its own, with no process in it except its init.

    `pid` is the init as the host sees it, `cgroups` the node's cgroups, one per hierarchy, as host
    paths, `homes` the cgroups that the node's processes start in.

    packages: Debian packages beside the packages of every node. on_disk: more directories outside
    of the node's overlay, by a name for each (see ON_DISK).
    """

    def __init__(
        self, suite: str, *, packages: Sequence[str] = (), on_disk: Mapping[str, str] | None = None
    ) -> None:
        self.suite = suite
        self._packages = tuple(packages)
        self._on_disk = {**ON_DISK, **(on_disk or {})}
        self.pid = -1
        self.cgroups: list[Path] = []
        self.homes: list[Path] = []
        self._directory = Path()
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        root = base.node_root(self.suite, self._packages)
        with ExitStack() as undo:
            self._directory = undo.enter_context(runs.run_directory(self.suite))
            self.cgroups = cgroups.make(self._directory.name)
            self.homes = [cgroups.home(path) for path in self.cgroups]
            self._launch(root, undo)
            self.write("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n")
            self.run(["ip", "link", "set", "lo", "up"])
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _launch(self, root: Path, undo: ExitStack) -> None:
        launcher = subprocess.Popen(
            [sys.executable, "-ISE", str(HERE / "launch.py"), json.dumps(self._plan(root))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=ENVIRONMENT,
            start_new_session=True,  # Ctrl-C is for the tests, which then stop us in order
        )
        undo.enter_context(launcher)
        undo.callback(self._kill, launcher)
        assert launcher.stdout is not None
        self.pid = int(_line(launcher.stdout))
        if _line(launcher.stdout) != "up":
            raise RuntimeError(f"node {self.name} did not come up, see above")

    def _plan(self, root: Path) -> dict[str, object]:
        for name in ("upper", "work", "merged", *self._on_disk):
            (self._directory / name).mkdir()
        return {
            "parent_pid": os.getpid(),
            "cgroups": [str(path) for path in self.cgroups],
            "homes": [str(path) for path in self.homes],
            "hierarchies": [
                {"version": h.version, "options": h.options, "mount_point": str(h.mount_point)}
                for h in cgroups.hierarchies()
            ],
            "lower": str(root),
            **{name: str(self._directory / name) for name in ("upper", "work", "merged")},
            "binds": {
                inside: str(self._directory / name) for name, inside in self._on_disk.items()
            },
            "hostname": f"{self.suite}-node",
        }

    def _kill(self, launcher: subprocess.Popen[bytes]) -> None:
        """Kill init, which takes all of the node along, and wait until init is gone."""
        if self.pid > 0 and launcher.poll() is None:
            os.kill(self.pid, signal.SIGKILL)  # not reaped by the launcher: still ours
        else:
            launcher.kill()
        launcher.wait(UP_WITHIN_S)
        self.pid = -1

    # Files

    def path(self, inside: str) -> Path:
        """Returns the host's path of a file in the node. No absolute symlink may be on the way.

        /var/run is such a symlink in Debian: the host's root would resolve it.
        """
        return Path(f"/proc/{self.pid}/root") / inside.lstrip("/")

    def write(self, inside: str, text: str) -> None:
        """Make a file in the node, and the directories above it."""
        self.path(inside).parent.mkdir(parents=True, exist_ok=True)
        self.path(inside).write_text(text)

    def kept(self, name: str) -> Path:
        """Returns a host path for a log of this run, unseen by the node, removed with the node."""
        assert self.pid > 0, "a node has a directory while it is up"
        return self._directory / name

    def host_pid(self, pid: int) -> int:
        """Returns the host's number of process `pid` of the node. Raises ProcessLookupError."""
        for host_pid in procfs.pids():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                numbers = procfs.numbers(host_pid)
                if len(numbers) > 1 and numbers[1] == pid and self._has(host_pid):
                    return host_pid
        raise ProcessLookupError(f"no process {pid} in {self.name}")

    def _has(self, pid: int) -> bool:
        own = f"/{cgroups.NAME_PREFIX}{self.name}"
        return any(own in path for _, path in procfs.cgroups(pid))

    @property
    def name(self) -> str:
        """Returns a name that is unique among the nodes of this machine."""
        return self._directory.name

    # Processes

    def popen(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        report_fd: int | None = None,
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """Start a command in the node. The command dies with the returned process; signals reach
        it.

        `report_fd` gets the command's own pid; `options` are Popen's.
        """
        entry = {
            "parent_pid": os.getpid(),
            "init_pid": self.pid,
            "homes": [str(path) for path in self.homes],
            "environment": {**ENVIRONMENT, **(environment or {})},
            "report_fd": report_fd,
        }
        command = [sys.executable, "-ISE", ENTER, json.dumps(entry), *argv]
        fds = () if report_fd is None else (report_fd,)
        return subprocess.Popen(command, pass_fds=fds, start_new_session=True, **options)

    def call(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float = 60,
        environment: Mapping[str, str] | None = None,
        stdin: int | IO[bytes] = subprocess.DEVNULL,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the node to its end, whatever its status. Raises CommandStuck."""
        # Files, not pipes: the command ends when its process has ended, and not when every process
        # that could have inherited a pipe has ended.
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            with self.popen(
                argv, environment=environment, stdin=stdin, stdout=out, stderr=err
            ) as process:
                try:
                    self._await(process, argv, timeout_s)
                except BaseException:
                    process.kill()
                    raise
            texts = [_text(each) for each in (out, err)]
        return subprocess.CompletedProcess(list(argv), process.returncode, *texts)

    def _await(
        self, process: subprocess.Popen[bytes], argv: Sequence[str], timeout_s: float
    ) -> None:
        deadline = time.monotonic() + timeout_s
        process_fd = os.pidfd_open(process.pid)
        try:
            # Looked at again each second: a machine under load was once seen to sleep on.
            while not select.select([process_fd], [], [], min(timeout_s, 1))[0]:
                if time.monotonic() > deadline:
                    raise CommandStuck(self, process.pid, argv, timeout_s)
        finally:
            os.close(process_fd)

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float = 60,
        environment: Mapping[str, str] | None = None,
        stdin: int | IO[bytes] = subprocess.DEVNULL,
    ) -> str:
        """Run a command in the node; returns the standard output. Raises CommandFailed."""
        done = self.call(argv, timeout_s=timeout_s, environment=environment, stdin=stdin)
        if done.returncode:
            raise CommandFailed(done)
        return done.stdout

    # Network

    def connect(self, ip: str, port: int, *, timeout_s: float = 10) -> socket.socket:
        """Opens a TCP connection out of the node's network namespace, to a pod for example."""
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        connection = self._socket(family)
        try:
            connection.settimeout(timeout_s)
            connection.connect((ip, port))
        except BaseException:
            connection.close()
            raise
        return connection

    def _socket(self, family: socket.AddressFamily) -> socket.socket:
        """Enter the node with a single thread: a socket belongs to the namespace of its thread."""
        made: list[socket.socket | OSError] = []
        init_fd = os.pidfd_open(self.pid)

        def make() -> None:
            try:
                kernel.setns(init_fd, kernel.CLONE_NEWNET)
                made.append(socket.socket(family, socket.SOCK_STREAM))
            except OSError as error:
                made.append(error)

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        os.close(init_fd)
        if isinstance(made[0], OSError):
            raise made[0]
        return made[0]

    def http_get(
        self, ip: str, port: int, path: str, *, timeout_s: float = 10, retry_s: float = 0
    ) -> HttpAnswer:
        """Send GET http://IP:PORT/PATH from within the node. Raises OSError, as sockets do.

        For `retry_s` asks a server again that is not there yet, or hangs up.
        """
        deadline = time.monotonic() + retry_s
        while True:
            try:
                return self.http("GET", ip, port, path, timeout_s=timeout_s)
            except (ConnectionError, http.client.HTTPException):
                if time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_EVERY_S)

    def http(
        self,
        method: str,
        ip: str,
        port: int,
        path: str,
        body: bytes = b"",
        *,
        timeout_s: float = 10,
    ) -> HttpAnswer:
        """Send an HTTP request within the node. Raises OSError or http.client.HTTPException."""
        client = http.client.HTTPConnection(ip, port)
        client.sock = self.connect(ip, port, timeout_s=timeout_s)
        try:
            client.request(method, path, body=body or None)
            answer = client.getresponse()
            return HttpAnswer(answer.status, answer.read())
        finally:
            client.close()


def _line(stream: IO[bytes]) -> str:
    """Returns the next line of the launcher, "" at the end. Raises TimeoutError."""
    line = b""
    while not line.endswith(b"\n"):
        if not select.select([stream], [], [], UP_WITHIN_S)[0]:
            raise TimeoutError("the node's launcher says nothing")
        byte = os.read(stream.fileno(), 1)
        if not byte:
            break
        line += byte
    return line.decode().strip()


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return procfs.children(pid)
    return []


def _doing(pid: int) -> str:
    """Returns state and kernel stack of a process, to show where the process hangs."""
    told = []
    for name in ("status", "wchan", "stack"):
        try:
            text = Path(f"/proc/{pid}/{name}").read_text(errors="replace")
        except OSError as error:
            text = f"{name}: {error.strerror}"
        told += [text.split("Tgid:")[0] if name == "status" else text]
    return f"process {pid}: " + " ".join("\n".join(told).split())
