"""Runs rounds of the storm without a container: hundreds in minutes.

Two programs in a round: the storm (`tests.storm.hollow`) and its page server
(`tests.storm.serving`). This module starts them, waits for both with a deadline, and judges.
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from shim.kernel import procfs
from tests.storm.hollow import REPORT, SOCKET, Wishes
from tests.storm.serving import How
from tests.workers.storm import HANG_S, Report, summary, waiting

ROOT: Final = Path(__file__).parents[2]
_PREPARED_WITHIN_S: Final = 60.0
_SERVER_ENDS_WITHIN_S: Final = 8.0
_SLACK_S: Final = 3 * HANG_S


@dataclass(slots=True)
class Round:
    """A round. wrong, hangs: the reports, empty when all is well."""

    seed: int
    seconds: float = 0.0
    filling_s: float = 0.0
    wrong: list[Any] = field(default_factory=list)
    hangs: list[Any] = field(default_factory=list)
    operations: dict[str, int] = field(default_factory=dict)

    @property
    def is_good(self) -> bool:
        """Whether there is no wrong byte and no hang."""
        return not self.wrong and not self.hangs


def chosen(seed: int, seconds: float) -> tuple[Wishes, How]:
    """Returns the parameters of a seed's round: few threads or many, quick or slow filling."""
    chance = random.Random(f"round {seed}")  # noqa: S311
    wishes = Wishes(
        seed, seconds, processes=chance.choice((1, 1, 2)), threads=chance.choice((1, 2, 3, 4, 6)),
        size_mib=chance.choice((8, 24, 48)),
    )  # fmt: skip
    threads, piece_kib = chance.choice((1, 2, 4)), chance.choice((4, 16, 64, 256, 1024))
    pieces = wishes.processes * wishes.size_mib * 1024 / piece_kib
    pause_s = seconds * threads / pieces * chance.choice((0.5, 1.0, 2.0))
    return wishes, How(piece_kib, round(pause_s, 5), threads, seconds + 1)


def run(wishes: Wishes, how: How) -> Round:
    """Run a round. Leaves no process and no file behind."""
    found = Round(wishes.seed)
    with tempfile.TemporaryDirectory(prefix="storm-") as name:
        directory = Path(name)
        report = Report(str(directory / REPORT))
        with _listener(directory) as listener, _started("hollow", directory, wishes) as storm:
            assert storm.stdin
            assert storm.stdout
            if storm.stdout.readline() != b"prepared\n":
                raise RuntimeError(f"the storm of seed {wishes.seed} did not begin")
            with _started("serving", directory, how, listener) as server:
                began = time.monotonic()
                storm.stdin.write(b"go\n")
                storm.stdin.flush()
                _wait(storm, server, wishes, found)
                found.seconds = round(time.monotonic() - began, 3)
        with contextlib.suppress(FileNotFoundError, ValueError):
            found.filling_s = round(float((directory / "filling").read_text()) - began, 3)
        told: dict[str, Any] = summary(report.read())
        found.wrong += told["wrong"]
        found.hangs += told["hangs"]
        found.operations = told["operations"]
    return found


def _wait(
    storm: subprocess.Popen[bytes], server: subprocess.Popen[bytes], wishes: Wishes, found: Round
) -> None:
    deadline = time.monotonic() + wishes.seconds + _SLACK_S
    while storm.poll() is None and time.monotonic() < deadline:
        if server.poll():
            found.wrong.append({"error": f"the page server failed:\n{_errors_of(server)}"})
            return
        time.sleep(0.01)
    if storm.poll() is None:
        where = {pid: waiting(pid) for pid in _group(storm.pid)}
        found.hangs.append({"what": "the storm did not end", "where": where})
        return
    if storm.returncode:
        found.wrong.append({"error": f"the storm ended with {storm.returncode}"})
    try:
        server.wait(_SERVER_ENDS_WITHIN_S)
    except subprocess.TimeoutExpired:
        found.hangs.append({"what": "the server did not end", "where": waiting(server.pid)})
        return
    if server.returncode:
        found.wrong.append({"error": f"the page server failed:\n{_errors_of(server)}"})


def _errors_of(server: subprocess.Popen[bytes]) -> str:
    assert server.stderr
    return server.stderr.read().decode(errors="replace")[-3000:]


@contextlib.contextmanager
def _listener(directory: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(directory / SOCKET))
        listener.listen()
        yield listener


@contextlib.contextmanager
def _started(
    program: str, directory: Path, how: Wishes | How, listener: socket.socket | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Yields a program in a session of its own; kills the whole session in the end."""
    fds = [listener.fileno()] if listener else []
    command = [sys.executable, "-m", f"tests.storm.{program}", str(directory)]
    command += [json.dumps(asdict(how)), *map(str, fds)]
    with subprocess.Popen(
        command, cwd=ROOT, pass_fds=fds, start_new_session=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE if listener else None,
    ) as started:  # fmt: skip
        try:
            yield started
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            with contextlib.suppress(BrokenPipeError):
                if started.stdin:
                    started.stdin.close()


def _group(leader: int) -> list[int]:
    found = []
    for pid in procfs.pids():
        with contextlib.suppress(OSError):
            if os.getpgid(pid) == leader:
                found.append(pid)
    return found
