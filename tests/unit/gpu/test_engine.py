"""Driver calls by helpers that die, hang and are late; with the stand-in for libcuda."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from shim.contract import journal
from shim.contract.errors import GpuLost, GpuNotCheckpointed
from shim.gpu import engine as engines
from shim.gpu.driverway import DriverWay
from shim.gpu.engine import Engine, bring_back
from shim.gpu.helper import CHECKPOINTED, LOCKED, RUNNING, Team
from shim.kernel import procfs
from shim.kernel.steps import Steps
from tests.gpu.standin.build import build
from tests.unit.gpuscene import Started

WITHIN_S = 20.0
CONTAINER = "c" * 64
WORKER = """
import ctypes, sys
lib = ctypes.CDLL("libcuda.so.1")
context, at, size = ctypes.c_void_p(), ctypes.c_uint64(), ctypes.c_size_t(4 << 20)
assert not lib.cuInit(0)
assert not lib.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
assert not lib.cuMemAlloc_v2(ctypes.byref(at), size)
assert not lib.cuMemsetD32_v2(at, 0xABCD1234, ctypes.c_size_t(1 << 20))
print("up", flush=True)
got = ctypes.create_string_buffer(4 << 20)
for line in sys.stdin:
    if line.split()[0] == "busy":
        lib.cuStandinBusy(int(line.split()[1]))
    else:
        assert not lib.cuMemcpyDtoH_v2(got, at, size)
    print(got.raw == b"\\x34\\x12\\xcd\\xab" * (1 << 20), flush=True)
"""


class Standin:
    """The stand-in and its home: faults are files there."""

    def __init__(self, home: Path) -> None:
        self.home = home
        for name in ("dev", "faults", "rate"):
            (home / name).mkdir()
        for name in ("nvidia0", "nvidiactl", "nvidia-uvm"):
            (home / "dev" / name).touch()
        self.environment = {
            "LD_LIBRARY_PATH": str(build()), "CUDA_STANDIN_HOME": str(home),
            "CUDA_STANDIN_DEV": str(home / "dev"), "PATH": os.environ["PATH"],
        }  # fmt: skip
        self.helpers: list[subprocess.Popen[bytes]] = []

    def spawn(self, argv: Sequence[str], fd: int) -> Started:
        self.helpers.append(subprocess.Popen(argv, env=self.environment, pass_fds=(fd,), cwd="/"))
        return Started(self.helpers[-1])

    def fault(self, call: str, what: str) -> None:
        (self.home / "faults" / call).write_text(f"{what}\n")


class Target:
    """A process with memory on the device."""

    def __init__(self, standin: Standin) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER], env=standin.environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.pid = self.process.pid
        assert self._line() == "up"

    def _line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def tell(self, line: str) -> str:
        assert self.process.stdin
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self._line()

    def is_right(self) -> bool:
        return self.tell("check") == "True"


@pytest.fixture
def standin(tmp_path: Path) -> Iterator[Standin]:
    made = Standin(tmp_path)
    yield made
    for helper in made.helpers:
        helper.kill()
        helper.wait()


@pytest.fixture
def targets(standin: Standin) -> Iterator[list[Target]]:
    made = [Target(standin) for _ in range(2)]
    yield made
    for each in made:
        each.process.kill()
        each.process.communicate()


@pytest.fixture
def pids(targets: list[Target]) -> list[int]:
    return [each.pid for each in targets]


@pytest.fixture(autouse=True)
def own_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(journal, "path_of", lambda _: str(tmp_path / "journal"))
    monkeypatch.setattr(engines, "CONTAINERS", str(tmp_path))
    (tmp_path / CONTAINER).mkdir()
    return tmp_path / "journal"


def soon() -> float:
    return time.monotonic() + WITHIN_S


def states(team: Team, pids: list[int]) -> list[str]:
    return [team.state(pid, soon()).state for pid in pids]


def all_succeed(team: Team, do: str, pids: list[int], within_s: float = WITHIN_S) -> bool:
    more = {"timeout_ms": 1000} if do == "lock" else {}
    answers = team.call(do, pids, time.monotonic() + within_s, **more)
    return all(each.is_success for each in answers.values())


def test_the_four_calls_lead_from_state_to_state(
    standin: Standin, targets: list[Target], pids: list[int]
) -> None:
    with Team(standin.spawn) as team:
        for do, state in (("lock", LOCKED), ("checkpoint", CHECKPOINTED), ("restore", LOCKED),
                          ("unlock", RUNNING)):  # fmt: skip
            assert all_succeed(team, do, pids)
            assert states(team, pids) == [state, state]
    assert all(each.is_right() for each in targets)


@pytest.mark.parametrize("call", ["lock", "checkpoint", "restore", "unlock"])
@pytest.mark.parametrize("how", ["die", "hang", "hang-done"])
def test_a_helper_that_is_lost_is_replaced_and_the_state_says_how_it_goes_on(
    standin: Standin, targets: list[Target], pids: list[int], call: str, how: str
) -> None:
    standin.fault(f"{call}.once", how)
    with Team(standin.spawn) as team:
        for do in ("lock", "checkpoint", "restore", "unlock"):
            within_s = 1.5 if do == call else WITHIN_S
            if how == "hang" and do == call:
                assert not all_succeed(team, do, pids, within_s)
                break
            assert all_succeed(team, do, pids, within_s), do
        assert bring_back(team, pids, soon()) == []
    assert all(each.is_right() for each in targets)


@pytest.mark.parametrize("steps", [(), ("lock",), ("lock", "checkpoint")])
def test_all_are_brought_back_from_any_state(
    standin: Standin, targets: list[Target], pids: list[int], steps: tuple[str, ...]
) -> None:
    with Team(standin.spawn) as team:
        for do in steps:
            assert all_succeed(team, do, pids[:1])
        assert bring_back(team, pids, soon()) == []
        assert states(team, pids) == [RUNNING, RUNNING]
    assert all(each.is_right() for each in targets)


def wait_for(done: Callable[[], bool]) -> bool:
    until = soon()
    while not done() and time.monotonic() < until:
        time.sleep(0.01)
    return done()


@pytest.mark.parametrize("how", ["the daemon ends", "the time is up"])
def test_guard_brings_back_processes_that_nobody_else_does(
    standin: Standin, targets: list[Target], pids: list[int], tmp_path: Path, how: str
) -> None:
    within_s = 60.0 if how == "the daemon ends" else 1.0
    team = Team(standin.spawn, guard_until=time.monotonic() + within_s, lock=str(tmp_path / "lock"))
    assert all_succeed(team, "lock", pids)
    assert all_succeed(team, "checkpoint", pids)
    assert journal.is_locked(str(tmp_path), "lock")
    if how == "the daemon ends":
        for helper in team._helpers.values():
            helper.end()
    assert all(each.is_right() for each in targets)
    assert wait_for(lambda: not journal.is_locked(str(tmp_path), "lock"))
    for helper in team._helpers.values():
        helper.end()


@contextlib.contextmanager
def stopped(
    standin: Standin, pids: list[int], others: Sequence[int] = (os.getpid(),)
) -> Iterator[Team]:
    """All are checkpointed inside. others: what else the container has."""
    with Team(standin.spawn) as team, DriverWay().evacuation(CONTAINER, -1, "") as evacuation:
        found = Engine(CONTAINER, lambda: [*others, *pids], team, Steps(), soon())
        assert found.find() == pids
        with found.stopped(evacuation):
            yield team


def test_a_capture_finds_stops_and_brings_back(
    standin: Standin, targets: list[Target], pids: list[int]
) -> None:
    with stopped(standin, pids) as team:
        assert states(team, pids) == [CHECKPOINTED, CHECKPOINTED]
        assert sorted(engines.left_over(CONTAINER)) == sorted(pids)
    assert engines.left_over(CONTAINER) == []
    assert all(each.is_right() for each in targets)


def test_a_capture_that_fails_brings_back(
    standin: Standin, targets: list[Target], pids: list[int]
) -> None:
    with pytest.raises(ZeroDivisionError), stopped(standin, pids):
        raise ZeroDivisionError
    assert all(each.is_right() for each in targets)


@pytest.mark.parametrize(
    ("call", "what", "word"),
    [("checkpoint.once", "error 2", "CUDA_ERROR_OUT_OF_MEMORY"),
     ("lock.once", "error 999", "CUDA_ERROR_UNKNOWN"), ("lock", "refuse 3", "NOT_INITIALIZED")],
)  # fmt: skip
def test_refusal_of_a_process_brings_all_processes_back(
    standin: Standin, targets: list[Target], pids: list[int], call: str, what: str, word: str
) -> None:
    standin.fault(call, what)
    with pytest.raises(GpuNotCheckpointed, match=word), stopped(standin, pids):
        raise AssertionError("not reached")
    assert all(each.is_right() for each in targets)


def test_endless_device_work_is_reported(
    standin: Standin, targets: list[Target], pids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_LOCK_S", 0.5)
    targets[0].tell("busy 3000")
    with (
        pytest.raises(GpuNotCheckpointed, match="still has work on the GPU"),
        stopped(standin, pids),
    ):
        pass
    assert all(each.is_right() for each in targets)


def test_process_that_the_driver_keeps_is_killed(
    standin: Standin, targets: list[Target], pids: list[int], own_journal: Path
) -> None:
    standin.fault("restore.once", "stuck 2")
    with pytest.raises(GpuLost, match="CUDA_ERROR_OUT_OF_MEMORY"), stopped(standin, pids, ()):
        pass
    assert [each.process.wait(WITHIN_S) for each in targets] == [-signal.SIGKILL] * 2
    assert engines.left_over(CONTAINER) == []


def test_process_that_ends_meanwhile_is_not_missed(
    standin: Standin, targets: list[Target], pids: list[int]
) -> None:
    with stopped(standin, pids):
        targets[0].process.kill()
        targets[0].process.wait()
    assert targets[1].is_right()


def test_next_daemon_brings_back_processes_of_a_killed_daemon(
    standin: Standin, targets: list[Target], pids: list[int], own_journal: Path
) -> None:
    noted = [[pid, procfs.start_ticks(pid)] for pid in pids]
    journal.note(str(own_journal), journal.GPU, noted)
    with Team(standin.spawn) as team:
        all_succeed(team, "lock", pids)
        all_succeed(team, "checkpoint", pids[:1])
    recovered = engines.recover(CONTAINER, lambda: pids, standin.spawn)
    assert sorted(recovered) == sorted(pids)
    assert engines.recover(CONTAINER, lambda: pids, standin.spawn) == []
    assert all(each.is_right() for each in targets)


def test_a_stopped_process_is_not_waited_for_for_ever(
    standin: Standin, targets: list[Target], pids: list[int]
) -> None:
    os.kill(pids[0], signal.SIGSTOP)
    try:
        with Team(standin.spawn) as team:
            began = time.monotonic()
            answers = team.call("lock", pids, began + 1.0, timeout_ms=500)
            assert time.monotonic() - began < 10
            assert not answers[pids[0]].is_success
            assert answers[pids[1]].is_success
            os.kill(pids[0], signal.SIGCONT)
            assert bring_back(team, pids, soon()) == []
    finally:
        os.kill(pids[0], signal.SIGCONT)
    assert all(each.is_right() for each in targets)
