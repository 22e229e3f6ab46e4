"""Device memory that is away comes back, whoever dies; with the stand-in for libcuda."""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from shim.contract import journal
from shim.contract.errors import GpuLost, GpuNotCheckpointed
from shim.gpu import engine as engines
from shim.gpu.direct.mover import CHUNK_BYTES
from shim.gpu.direct.session import _opened_to_all
from shim.gpu.direct.way import away
from shim.gpu.helper import Team
from shim.kernel import procfs
from tests.gpu.direct.program import Program
from tests.unit.gpuscene import (
    BLOCK_MIB,
    BLOCKS,
    CONTAINER,
    Scene,
    called,
    directory,
    right,
    soon,
)

DAEMON = """
import os, sys, time
from tests.unit.gpu.direct.test_guard import daemon
daemon(sys.argv[1:])
"""


@contextlib.contextmanager
def slow(scene: Scene, mib_s: int) -> Iterator[None]:
    """The device copies so slowly."""
    (scene.home / "rate").mkdir(exist_ok=True)
    (scene.home / "rate" / "to_host").write_text(str(mib_s << 20))
    try:
        yield
    finally:
        (scene.home / "rate" / "to_host").unlink()


def digests(scene: Scene) -> dict[str, str]:
    """Of the chunks whose content the program never changes: the first ones."""
    whole = BLOCK_MIB * BLOCKS // (CHUNK_BYTES >> 20)
    return {
        path.name: hashlib.sha256(path.read_bytes()[:CHUNK_BYTES]).hexdigest()
        for path in sorted(scene.payload.iterdir())[:whole]
    }


def saved(scene: Scene, program: Program) -> tuple[dict[str, str], float]:
    """Digests of the payload of one capture, and how long the memory was on its way back."""
    with scene.evacuation() as evacuation:
        evacuation.prepare([program.pid], soon())
        evacuation.evacuate(soon())
        began = time.monotonic()
        evacuation.give_back(soon())
        evacuation.resume(soon())
        took = time.monotonic() - began
        right(program)
        evacuation.finish(soon())
    found = digests(scene)
    for path in scene.payload.iterdir():
        path.unlink()
    return found, took


def test_the_source_does_not_wait_for_the_files_of_its_memory(scene: Scene) -> None:
    with scene.asked() as program:
        first, _ = saved(scene, program)
        with slow(scene, 5):
            second, took = saved(scene, program)
        assert took < 2.0
        assert first == second


@pytest.mark.parametrize("is_taken", [False, True])
def test_a_carrier_that_dies_costs_the_source_only_what_it_has(
    scene: Scene, *, is_taken: bool
) -> None:
    with scene.asked() as program, scene.evacuation() as evacuation:
        evacuation.prepare([program.pid], soon())
        if is_taken:
            evacuation.evacuate(soon())
        scene.started[-1].kill()
        if is_taken:
            with pytest.raises(GpuNotCheckpointed, match="the carrier"):
                evacuation.give_back(soon())
            assert "pieces of process" in away(CONTAINER, [program.pid], soon())[0]
            os.kill(program.pid, signal.SIGKILL)
            return
        with pytest.raises(GpuNotCheckpointed, match="the carrier"):
            evacuation.evacuate(soon())
        evacuation.give_back(soon())
        evacuation.resume(soon())
        right(program)


def test_a_socket_that_somebody_takes_away_is_made_again(scene: Scene) -> None:
    with scene.asked() as program, scene.evacuation() as evacuation:
        evacuation.prepare([program.pid], soon())
        evacuation.evacuate(soon())
        (scene.control / "gpu.sock").unlink()
        evacuation.give_back(soon())
        evacuation.resume(soon())
        right(program)


@pytest.mark.attack("a container puts a link in the place of the socket, whose rights are set")
def test_link_in_the_place_of_the_socket_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.touch(mode=0o600)
    (tmp_path / "gpu.sock").symlink_to(victim)
    with directory(tmp_path) as fd, pytest.raises(OSError, match="no socket"):
        _opened_to_all(fd)
    assert victim.stat().st_mode & 0o777 == 0o600


def daemon(words: list[str]) -> None:
    """Be a daemon that captures process PID of scene HOME, up to a step, and then hangs."""
    home, control, pid, step = words
    scene = Scene.of(home, control)
    program = SimpleNamespace(pid=int(pid))
    lock = f"{home}/{CONTAINER}/gpu.lock"
    with (
        Team(scene.spawn, guard_until=soon(), lock=lock) as team,
        scene.evacuation(lock) as evacuation,
    ):

        def at(name: str) -> None:
            if step == name:
                print("there", flush=True)
                time.sleep(1000)

        evacuation.prepare([program.pid], soon())
        at("closed")
        for do in ("lock", "unlock"):
            called(team, do, program)  # type: ignore[arg-type]
        evacuation.evacuate(soon())
        at("taken")
        for do in ("lock", "checkpoint"):
            called(team, do, program)  # type: ignore[arg-type]
        at("checkpointed")
        for do in ("restore", "unlock"):
            called(team, do, program)  # type: ignore[arg-type]
        at("restored")
        evacuation.give_back(soon())
        at("given")


@pytest.fixture
def own_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(journal, "path_of", lambda _: str(tmp_path / "journal"))
    monkeypatch.setattr(engines, "CONTAINERS", str(tmp_path))
    (tmp_path / CONTAINER).mkdir()
    return tmp_path / "journal"


STEPS = ("closed", "taken", "checkpointed", "restored", "given")


@contextlib.contextmanager
def hanging(scene: Scene, program: Program, step: str) -> Iterator["subprocess.Popen[str]"]:
    """A daemon that hangs at a step of a capture, about which its journal knows."""
    journal.note(
        journal.path_of(CONTAINER), journal.GPU,
        [[program.pid, procfs.start_ticks(program.pid)]],
    )  # fmt: skip
    argv = [sys.executable, "-c", DAEMON, str(scene.home), str(scene.control.parent),
            str(program.pid), step]  # fmt: skip
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "there\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("step", STEPS)
def test_next_daemon_finds_the_source_with_all_its_memory(
    scene: Scene, own_journal: Path, step: str
) -> None:
    with scene.asked() as program, hanging(scene, program, step) as process:
        process.kill()
        engines.recover(CONTAINER, lambda: [program.pid], scene.spawn)
        right(program)
        assert engines.left_over(CONTAINER) == []
        assert own_journal.exists()


@pytest.mark.parametrize("step", ["taken", "checkpointed", "restored"])
def test_stopped_daemon_does_not_keep_the_memory(
    scene: Scene, own_journal: Path, step: str
) -> None:
    assert not own_journal.exists()
    with scene.asked() as program, hanging(scene, program, step) as process:
        process.send_signal(signal.SIGSTOP)
        right(program)


def test_daemon_that_hangs_does_not_keep_the_memory(scene: Scene) -> None:
    with scene.asked() as program, scene.evacuation() as evacuation:
        evacuation.prepare([program.pid], soon())
        evacuation.evacuate(time.monotonic() + 6.0)
        until = soon()
        while not scene.on_device(program.pid):  # an answer may still have been on its way
            assert time.monotonic() < until, "the memory does not come back by itself"
            time.sleep(0.05)
        right(program)
        evacuation.give_back(soon())
        evacuation.resume(soon())
        right(program)
        with pytest.raises(GpuNotCheckpointed):
            evacuation.finish(soon())


@pytest.mark.parametrize("step", ["taken", "checkpointed", "restored"])
def test_next_daemon_kills_a_source_whose_memory_died_with_the_carrier(
    scene: Scene, own_journal: Path, step: str
) -> None:
    assert not own_journal.exists()
    with scene.asked() as program, hanging(scene, program, step) as process:
        for pid in carriers(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.kill()
        with pytest.raises(GpuLost, match="pieces of process"):
            engines.recover(CONTAINER, lambda: [program.pid], scene.spawn)
        until = soon()
        while program.alive() and time.monotonic() < until:
            time.sleep(0.01)
        assert not program.alive()


def carriers(parent: int) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                words = Path(f"/proc/{entry}/cmdline").read_bytes()
                if int(stat[1]) == parent and b"carrier.py" in words:
                    found.append(int(entry))
    return found
