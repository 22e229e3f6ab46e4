"""Question 8: what is left after a failure, and is anything stuck."""

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from tests.gpu.children import Helper
from tests.gpu.container import Container
from tests.gpu.part_states import device_used_mib
from tests.gpu.scene import Scene

LAYOUT: Final = "2048x4"
SETTLED_S: Final = 3.0


def settled_mib() -> int | str:
    """Device memory in use, once it no longer changes."""
    until, last = time.monotonic() + SETTLED_S, device_used_mib()
    while time.monotonic() < until:
        time.sleep(0.3)
        now = device_used_mib()
        if now == last:
            break
        last = now
    return last


def lock_times_out(scene: Scene, helper: Helper) -> dict[str, Any]:
    """A kernel runs for 4 s; the lock waits half a second, then once more for as long as needed."""
    with scene.cuda("512") as worker:
        worker.ask("spin 4000")
        found: dict[str, Any] = {"lock 500 ms": helper.do("lock", worker.pid, timeout_ms=500)}
        found["state"] = helper.state(worker.pid)
        if found["state"] != "locked":
            found["lock again 20 s"] = helper.do("lock", worker.pid, timeout_ms=20_000)
            found["state then"] = helper.state(worker.pid)
        found["unlock"] = helper.do("unlock", worker.pid)
        return {**found, "check": worker.check()}


def wrong_order(scene: Scene, helper: Helper) -> dict[str, Any]:
    """Calls in states that they are not for."""
    with scene.cuda("512") as worker:
        pid = worker.pid
        found: dict[str, Any] = {
            "running: checkpoint": helper.do("checkpoint", pid),
            "running: restore": helper.do("restore", pid),
            "running: unlock": helper.do("unlock", pid),
            "lock": helper.do("lock", pid, timeout_ms=5000),
            "locked: lock": helper.do("lock", pid, timeout_ms=500),
            "locked: restore": helper.do("restore", pid),
            "checkpoint": helper.do("checkpoint", pid),
            "checkpointed: lock": helper.do("lock", pid, timeout_ms=500),
            "checkpointed: checkpoint": helper.do("checkpoint", pid),
            "checkpointed: unlock": helper.do("unlock", pid),
        }
        return {**found, **helper.thaw(pid), "check": worker.check()}


def host_memory(scene: Scene, helper: Helper) -> dict[str, Any]:
    """The process may not map more memory (RLIMIT_AS) than it has when it is checkpointed."""
    with scene.cuda(LAYOUT) as worker:
        before = resource.prlimit(worker.pid, resource.RLIMIT_AS)
        resource.prlimit(worker.pid, resource.RLIMIT_AS, (1 << 30, before[1]))
        froze = helper.freeze(worker.pid)
        resource.prlimit(worker.pid, resource.RLIMIT_AS, before)
        found: dict[str, Any] = {"frozen": froze, "alive": worker.alive()}
        found["device MiB"] = settled_mib()
        again = helper.freeze(worker.pid)
        found["tried again"] = again
        found["thawed"] = helper.thaw(worker.pid)
        found["check"] = worker.check(20)
        found["a whole cycle"] = [helper.freeze(worker.pid), helper.thaw(worker.pid)]
        found["check then"] = worker.check(20)
        found["killed in s"] = worker.kill()
        return {**found, "device MiB at the end": settled_mib()}


def memory_limit(scene: Scene, helper: Helper) -> dict[str, Any]:
    """A container with 1 GiB of memory and 2 GiB on the device."""
    container = Container(scene.bundle, scene.scratch, "limited", memory_bytes=1 << 30)
    try:
        worker = container.start(scene.cuda_argv("1024x2"), timeout_s=60)
        found: dict[str, Any] = {"device MiB": device_used_mib()}
        found["frozen"] = helper.freeze(worker.pid)
        found["alive"] = worker.alive()
        events = list(Path("/sys/fs/cgroup").glob(f"**/{container.name}/memory.events"))
        found["memory.events"] = events[0].read_text().split() if events else "not there"
        return {**found, "device MiB then": settled_mib()}
    finally:
        container.end()


def device_memory(scene: Scene, helper: Helper) -> dict[str, Any]:
    """Another process takes the device's memory while this one is checkpointed."""
    with scene.cuda(LAYOUT) as worker, scene.cuda("64") as hog:
        found: dict[str, Any] = {"frozen": helper.freeze(worker.pid)["state"]}
        taken = 64
        for mib in (65536, 32768, 16384, 8192, 4096, 2048, 1024):
            while hog.ask(f"alloc {mib}").get("ok") and not scene.fake:
                taken += mib
        found |= {"taken MiB": taken, "device MiB": device_used_mib()}
        found["restore"] = helper.do("restore", worker.pid)
        found["state"] = helper.state(worker.pid)
        hog.kill()
        found["device MiB without the other"] = settled_mib()
        found["restore again"] = helper.do("restore", worker.pid)
        found["unlock"] = helper.do("unlock", worker.pid)
        found["state then"] = helper.state(worker.pid)
        found["check"] = worker.check(20)
        found["killed in s"] = worker.kill()
        return {**found, "device MiB at the end": settled_mib()}


def killed_in(scene: Scene, helper: Helper) -> dict[str, Any]:
    """SIGKILL in each state; is the device's memory free then."""
    found: dict[str, Any] = {"device MiB before": settled_mib()}
    for name, steps in (("running", ()), ("locked", ("lock",)), ("checkpointed", CHECKPOINT),
                        ("restored, locked", (*CHECKPOINT, "restore"))):  # fmt: skip
        with scene.cuda(LAYOUT) as worker:
            for step in steps:
                helper.do(step, worker.pid, timeout_ms=20_000)
            found[name] = {"gone in s": worker.kill(), "device MiB": settled_mib()}
    return found


def killed_during(scene: Scene, helper: Helper) -> dict[str, Any]:
    """SIGKILL while the checkpoint and the restore are under way."""
    del helper
    found: dict[str, Any] = {}
    for name, before in (("checkpoint", ("lock",)), ("restore", CHECKPOINT)):
        with scene.cuda(LAYOUT) as worker, scene.helper() as other:
            for step in before:
                other.do(step, worker.pid, timeout_ms=20_000)
            kill_after(worker.pid, 0.3)
            found[name] = {
                "call": other.do(name, worker.pid, timeout_s=20),
                "gone in s": worker.kill(),
                "device MiB": settled_mib(),
            }
    return found


def helper_killed(scene: Scene, helper: Helper) -> dict[str, Any]:
    """The helper dies during a checkpoint: in what state is the process, and can it go on."""
    found: dict[str, Any] = {}
    with scene.cuda(LAYOUT) as worker:
        with scene.helper() as other:
            other.do("lock", worker.pid, timeout_ms=20_000)
            kill_after(other.pid, 0.3)
            found["call"] = other.do("checkpoint", worker.pid, timeout_s=20)
        found["state at once"] = helper.state(worker.pid)
        time.sleep(8)
        found["state after 8 s"] = helper.state(worker.pid)
        found["thawed"] = helper.thaw(worker.pid)
        if found["thawed"]["state"] == "locked":
            found["unlock"] = helper.do("unlock", worker.pid)
        return {**found, "check": worker.check(20)}


def kill_after(pid: int, seconds: float) -> None:
    """By a child, as the caller will be waiting."""
    if os.fork() == 0:
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os._exit(0)


def stopped(scene: Scene, helper: Helper) -> dict[str, Any]:
    """The process is stopped (SIGSTOP), as a frozen cgroup would have it."""
    with scene.cuda("512") as worker:
        os.kill(worker.pid, signal.SIGSTOP)
        found = {"lock while stopped": helper.do("lock", worker.pid, timeout_ms=2000, timeout_s=8)}
        os.kill(worker.pid, signal.SIGCONT)
        time.sleep(0.2)
        with scene.helper() as other:
            found["state"] = {"state": other.state(worker.pid)}
            other.do("unlock", worker.pid)
        return {**found, "check": worker.check(20)}


def stopped_later(scene: Scene, helper: Helper) -> dict[str, Any]:
    """Stopped between lock and checkpoint, and between checkpoint and restore."""
    del helper
    found: dict[str, Any] = {}
    for name, before in (("checkpoint", ("lock",)), ("restore", CHECKPOINT)):
        with scene.cuda("512") as worker, scene.helper() as other:
            for step in before:
                other.do(step, worker.pid, timeout_ms=5000)
            os.kill(worker.pid, signal.SIGSTOP)
            found[f"{name} while stopped"] = other.do(name, worker.pid, timeout_s=5)
            os.kill(worker.pid, signal.SIGCONT)
            time.sleep(1.5)
            with scene.helper() as third:
                found[f"{name}: state after SIGCONT"] = third.state(worker.pid)
                found[f"{name}: thawed"] = third.thaw(worker.pid)
            found[f"{name}: check"] = worker.check(10)
    return found


CHECKPOINT: Final = ("lock", "checkpoint")
Step = Callable[[Scene, Helper], dict[str, Any]]
STEPS: Final[dict[str, Step]] = {
    "lock time-out": lock_times_out,
    "wrong order": wrong_order,
    "killed in each state": killed_in,
    "killed during": killed_during,
    "helper killed": helper_killed,
    "host memory": host_memory,
    "memory limit": memory_limit,
    "device memory": device_memory,
    "stopped": stopped,
    "stopped later": stopped_later,
}


def run(scene: Scene, only: tuple[str, ...]) -> None:
    """`only`: which of the steps. Each has a helper of its own: one that hangs ends with it."""
    for name, work in STEPS.items():
        if scene.wanted(name, only):
            scene.step(name, partial(_one, scene, work))


def _one(scene: Scene, work: Step) -> dict[str, Any]:
    with scene.helper() as helper:
        return work(scene, helper)
