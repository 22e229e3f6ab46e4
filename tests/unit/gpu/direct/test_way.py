"""The way direct, end to end but for CRIU: the library, the carrier, the stand-in for libcuda."""

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from shim.contract.errors import GpuNotCheckpointed, GpuNotRestored
from shim.gpu.direct import way as ways
from shim.gpu.direct.session import Door, Lost, NotOurs, Refused, has_library, service_thread
from shim.gpu.direct.way import DirectWay
from shim.gpu.helper import Team
from shim.kernel import procfs
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

    def spawn(self, argv: Sequence[str], fd: int) -> Started:
        self.started.append(subprocess.Popen(argv, env=self.environment, pass_fds=(fd,), cwd="/"))
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
        spans = [area.range for area in procfs.areas(pid, b"standin-device-memory")]
        return sum(end - start for start, end in spans) >> 20

    @contextlib.contextmanager
    def evacuation(self) -> "Iterator[Evacuation]":
        way = DirectWay(self.spawn, CONTAINER)
        with directory(self.payload) as fd, way.evacuation(CONTAINER, fd) as evacuation:
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


@pytest.fixture(scope="module")
def built() -> Iterator[Built]:
    with tempfile.TemporaryDirectory(prefix="qt") as at:
        yield Built(Path(at))


@pytest.fixture
def scene(tmp_path: Path, built: Built, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, built, monkeypatch)


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


def test_a_busy_program_gives_its_memory_away_and_goes_on(scene: Scene) -> None:
    with scene.asked() as program:
        captured(scene, program)
        right(program)
        for path in scene.payload.iterdir():
            path.unlink()
        about = captured(scene, program)
        right(program)
        pieces = about["processes"][0]["pieces"]
        assert sum(octets for _, octets, _ in pieces) >= BLOCKS * BLOCK_MIB << 20
        saved = sum(path.stat().st_size for path in scene.payload.iterdir())
        assert saved == sum(octets for _, octets, _ in pieces)


@contextlib.contextmanager
def emptied(scene: Scene, program: Program) -> Iterator[dict[str, Any]]:
    """The memory is in the files alone, and the gate closed, as in a restored process."""
    with scene.evacuation() as evacuation:
        evacuation.prepare([program.pid], soon())
        evacuation.evacuate(soon())
        about = dict(evacuation.finish(soon()))
    yield json.loads(json.dumps(about))


def test_memory_is_loaded_from_the_files(scene: Scene) -> None:
    with scene.asked() as program, emptied(scene, program) as about:
        with scene.loading(about) as loading:
            loading.begin(soon())
            loading.give_back([program.pid], soon())
            loading.resume(soon())
            loading.end()
        right(program)
        assert scene.started[-1].poll() is not None


def test_truncated_payload_is_reported(scene: Scene) -> None:
    with scene.asked() as program, emptied(scene, program) as about:
        path = max(scene.payload.iterdir(), key=lambda each: each.stat().st_size)
        os.truncate(path, path.stat().st_size - 4096)
        with scene.loading(about) as loading:
            loading.begin(soon())
            with pytest.raises(GpuNotRestored, match="the payload ends at"):
                loading.give_back([program.pid], soon())
        os.kill(program.pid, 9)


def test_a_carrier_that_dies_before_it_has_the_memory_leaves_the_source_alone(scene: Scene) -> None:
    with scene.asked() as program, scene.evacuation() as evacuation:
        evacuation.prepare([program.pid], soon())
        scene.started[-1].kill()
        with pytest.raises(GpuNotCheckpointed, match="the carrier"):
            evacuation.evacuate(soon())
        right(program)


def test_a_capture_that_is_given_up_leaves_the_source_alone(scene: Scene) -> None:
    with scene.asked() as program, scene.evacuation() as evacuation:
        evacuation.prepare([program.pid], soon())
        evacuation.give_back(soon())
        evacuation.resume(soon())
        evacuation.resume(soon())
        right(program)


def test_a_daemon_that_dies_with_the_memory_away_hurts_nobody(scene: Scene) -> None:
    """The carrier lives on without it, and gives the memory back."""
    with scene.asked() as program, scene.evacuation() as evacuation:
        evacuation.prepare([program.pid], soon())
        evacuation.evacuate(soon())
        assert scene.on_device(program.pid) == 0
        evacuation._carrier._socket.close()  # type: ignore[attr-defined]
        right(program)
        scene.started[-1].wait(WITHIN_S)


def test_a_full_disk_costs_the_snapshot_and_not_the_source(scene: Scene) -> None:
    for number in range(16):
        (scene.payload / f"gpu0-{number:02d}.data").touch()  # what is there already cannot be made
    with scene.asked() as program, scene.evacuation() as evacuation:
        evacuation.prepare([program.pid], soon())
        evacuation.evacuate(soon())
        evacuation.give_back(soon())
        evacuation.resume(soon())
        right(program)
        with pytest.raises(GpuNotCheckpointed, match="device memory was not saved"):
            evacuation.finish(soon())


def test_a_host_that_hangs_up_or_is_silent_opens_the_gate(scene: Scene) -> None:
    with scene.asked() as program, scene.door() as door:
        with door.call(program.pid, soon()) as session:
            session.close_gate(5.0, 20.0, soon())
            assert session.state(soon()).closed
        right(program)
        with door.call(program.pid, soon()) as session:
            session.close_gate(5.0, 0.3, soon())
            right(program)


def test_nothing_is_moved_while_the_gate_is_open(scene: Scene) -> None:
    with scene.asked() as program, scene.door() as door:
        with door.call(program.pid, soon()) as session, pytest.raises(Lost, match="gate is open"):
            session.drop(soon())
        right(program)


def test_a_call_that_does_not_return_keeps_the_gate_open(scene: Scene) -> None:
    """A thread inside of the driver is named, and the source goes on."""
    code = (
        "import ctypes, sys, threading, time\n"
        "lib = ctypes.CDLL('libcuda.so.1')\n"
        "context, at = ctypes.c_void_p(), ctypes.c_uint64()\n"
        "assert not lib.cuInit(0)\n"
        "assert not lib.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)\n"
        "assert not lib.cuMemAlloc_v2(ctypes.byref(at), ctypes.c_size_t(16 << 20))\n"
        "lib.cuStandinBusy(600000)\n"
        "threading.Thread(target=lib.cuCtxSynchronize, daemon=True).start()\n"
        "time.sleep(0.2)\n"
        "open(sys.argv[1] + '/status', 'w').write('{\"answers\": 1}')\n"
        "while True: time.sleep(1)\n"
    )
    program = Program(["/usr/bin/python3", "-c", code, "STATUS"], str(scene.library))
    with program, scene.door() as door:
        program.ready(WITHIN_S)
        with door.call(program.pid, soon()) as session:
            with pytest.raises(Refused, match="cuCtxSynchronize has not returned"):
                session.close_gate(0.3, 20.0, soon())
            assert not session.state(soon()).closed
        os.kill(program.pid, 9)


def test_a_program_without_large_memory_has_no_thread_of_ours(scene: Scene) -> None:
    code = "import ctypes, time; ctypes.CDLL('libcuda.so.1').cuInit(0); time.sleep(60)"
    with Program(["/usr/bin/python3", "-c", code], str(scene.library)) as program:
        time.sleep(0.3)
        with pytest.raises(NotOurs):
            service_thread(program.pid)
        assert not has_library(program.pid)
        os.kill(program.pid, 9)


SHARING = """
import ctypes, sys
class Handle(ctypes.Structure):
    _fields_ = [("octets", ctypes.c_char * 64)]
lib = ctypes.CDLL("libcuda.so.1")
context, at, handle = ctypes.c_void_p(), ctypes.c_uint64(), Handle()
size = ctypes.c_size_t(24 << 20)
assert not lib.cuInit(0)
assert not lib.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
here = ctypes.create_string_buffer(5)
if sys.argv[1] == "makes":
    assert not lib.cuMemAlloc_v2(ctypes.byref(at), size)
    assert not lib.cuMemcpyHtoD_v2(at, b"first", ctypes.c_size_t(5))
    assert not lib.cuIpcGetMemHandle(ctypes.byref(handle), ctypes.c_uint64(at.value + 4096))
    print(bytes(handle).hex(), flush=True)
else:
    handle = Handle.from_buffer_copy(bytes.fromhex(sys.argv[2]))
    again = ctypes.c_uint64()
    assert not lib.cuIpcOpenMemHandle_v2(ctypes.byref(at), handle, 1)
    assert not lib.cuIpcOpenMemHandle_v2(ctypes.byref(again), handle, 1)
    assert at.value == again.value
    assert not lib.cuMemcpyDtoH_v2(here, at, ctypes.c_size_t(5))
    assert here.raw == b"first", here.raw
    assert not lib.cuMemcpyHtoD_v2(at, b"other", ctypes.c_size_t(5))
    print("opened", flush=True)
sys.stdin.readline()
if sys.argv[1] == "makes":
    assert not lib.cuMemcpyDtoH_v2(here, at, ctypes.c_size_t(5))
    print(here.raw.decode(), flush=True)
else:
    assert not lib.cuIpcCloseMemHandle(at)
    assert not lib.cuIpcCloseMemHandle(at)
    assert lib.cuIpcCloseMemHandle(at)
    print("closed", flush=True)
sys.stdin.readline()
"""


def test_processes_share_blocks_by_ipc_handles(scene: Scene) -> None:
    """CUDA's own handles cannot be made of them; and the host learns that something is open."""
    environment = {**scene.environment, "LD_PRELOAD": str(scene.library)}

    def start(*words: str) -> subprocess.Popen[str]:
        argv = ["/usr/bin/python3", "-c", SHARING, *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, env=environment)

    def next_line(program: subprocess.Popen[str], *, ask: bool = True) -> str:
        assert program.stdin
        assert program.stdout
        if ask:
            program.stdin.write("\n")
            program.stdin.flush()
        return program.stdout.readline().strip()

    with start("makes") as maker:
        handle = next_line(maker, ask=False)
        with start("opens", handle) as opener:
            assert next_line(opener, ask=False) == "opened"
            assert next_line(maker) == "other"
            with scene.door() as door:
                with door.call(opener.pid, soon()) as session:
                    assert {"open IPC handles", "imported handles"} <= set(session.hello.seen)
                with door.call(maker.pid, soon()) as session:
                    assert session.hello.seen == ["shared IPC handles"]
            assert next_line(opener) == "closed"
            with scene.door() as door, door.call(opener.pid, soon()) as session:
                assert session.hello.seen == []
            opener.communicate("\n")
        maker.communicate("\n")
    assert (opener.returncode, maker.returncode) == (0, 0)
