"""A scene for tests of the way direct: the library, the carrier, the stand-in for libcuda."""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from shim.gpu.direct import way as ways
from shim.gpu.direct.session import Door
from shim.gpu.direct.way import DirectWay
from shim.gpu.helper import Team
from tests.gpu.direct import preload
from tests.gpu.direct.program import Program
from tests.gpu.standin.build import build

if TYPE_CHECKING:
    from shim.gpu.way import Evacuation, Loading

WITHIN_S = 30.0
CONTAINER = "gpu"
BLOCK_MIB, BLOCKS = 10, 5


class Started:
    """A program that a test started."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


class Scene:
    """The stand-in's home, a control directory, the library that calls there."""

    def __init__(self, home: Path, built: "Built", monkeypatch: pytest.MonkeyPatch) -> None:
        self.home, self.control, self.payload = home, built.control / CONTAINER, home / "payload"
        self.library, self.plain = built.library, built.plain
        for directory in (self.payload, home / "dev", home / "faults"):
            directory.mkdir()
        for name in ("nvidia0", "nvidiactl", "nvidia-uvm"):
            (home / "dev" / name).touch()
        self.environment = {
            "LD_LIBRARY_PATH": str(build()), "CUDA_STANDIN_HOME": str(home),
            "CUDA_STANDIN_DEV": str(home / "dev"), "PATH": os.environ["PATH"],
        }  # fmt: skip
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(ways, "CONTROL", str(built.control))
        self.started: list[subprocess.Popen[bytes]] = []

    @classmethod
    def of(cls, home: str, control: str) -> "Scene":
        """The same scene in another process, which has its environment."""
        ways.__dict__["CONTROL"] = control
        found = cls.__new__(cls)
        found.home, found.payload = Path(home), Path(home) / "payload"
        found.environment, found.started = dict(os.environ), []
        return found

    def spawn(self, argv: Sequence[str], fd: int) -> Started:
        self.started.append(
            subprocess.Popen(
                argv, env=self.environment, pass_fds=(fd,), cwd="/", start_new_session=True
            )
        )
        return Started(self.started[-1])

    @contextlib.contextmanager
    def asked(self, threads: int = 3) -> Iterator[Program]:
        """A program that looks at its device memory without pause."""
        words = [str(BLOCK_MIB), str(BLOCKS), str(threads)]
        with Program([str(self.plain), "STATUS", *words], str(self.library)) as program:
            program.ready(WITHIN_S)
            yield program

    def on_device(self, pid: int) -> int:
        """MiB of device memory that the process has mapped."""
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        spans = [line.split()[0].split("-") for line in maps if "standin-device-memory" in line]
        return sum(int(end, 16) - int(start, 16) for start, end in spans) >> 20

    @contextlib.contextmanager
    def evacuation(self, lock: str = "") -> "Iterator[Evacuation]":
        way = DirectWay(self.spawn, CONTAINER)
        with directory(self.payload) as fd, way.evacuation(CONTAINER, fd, lock) as evacuation:
            yield evacuation

    @contextlib.contextmanager
    def loading(self, about: dict[str, Any]) -> "Iterator[Loading]":
        way = DirectWay(self.spawn, CONTAINER)
        with directory(self.payload) as fd, way.loading(CONTAINER, fd, about, []) as loading:
            yield loading

    @contextlib.contextmanager
    def door(self) -> Iterator[Door]:
        with directory(self.control) as fd, Door(fd) as door:
            yield door


@contextlib.contextmanager
def directory(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


class Built:
    """Programs that are compiled once. The path of a socket is short."""

    def __init__(self, control: Path) -> None:
        self.control = control
        (control / CONTAINER).mkdir()
        self.library = preload.library(control, control / CONTAINER)
        self.plain = preload.plain(control)


def soon() -> float:
    return time.monotonic() + WITHIN_S


def right(program: Program) -> None:
    """It has answered since, and never wrong, and no system call of it was interrupted."""
    status = program.more(program.status(), WITHIN_S)
    assert not status["wrong"], status
    assert not status["errors"], status
    assert not status["interrupted"], status


def called(team: Team, do: str, program: Program) -> None:
    more = {"timeout_ms": 5000} if do == "lock" else {}
    assert team.call(do, [program.pid], soon(), **more)[program.pid].is_success


def captured(scene: Scene, program: Program) -> dict[str, Any]:
    """The engine's order, without CRIU; what `finish` says."""
    with Team(scene.spawn) as team, scene.evacuation() as evacuation:
        evacuation.prepare([program.pid], soon())
        for do in ("lock", "unlock"):
            called(team, do, program)
        evacuation.evacuate(soon())
        assert scene.on_device(program.pid) == 0
        for do in ("lock", "checkpoint"):
            called(team, do, program)
        before = program.status()["answers"]
        evacuation.checkpointed(soon())
        for do in ("restore", "unlock"):
            called(team, do, program)
        time.sleep(0.1)
        assert program.status()["answers"] <= before + 3, "calls go through a closed gate"
        evacuation.give_back(soon())
        evacuation.resume(soon())
        return dict(evacuation.finish(soon()))


@contextlib.contextmanager
def emptied(scene: Scene, program: Program) -> Iterator[dict[str, Any]]:
    """The memory is in the files alone, and the gate closed, as in a restored process."""
    with scene.evacuation() as evacuation:
        evacuation.prepare([program.pid], soon())
        evacuation.evacuate(soon())
        about = dict(evacuation.finish(soon()))
    yield json.loads(json.dumps(about))
