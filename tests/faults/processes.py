"""Faults from outside: a process of a node is killed or stopped during a restore."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from shim.kernel import procfs
from tests.faults import restoring
from tests.faults.cases import Case
from tests.faults.ground import RESTORE, Ground, Missed, WentWrong
from tests.faults.restoring import Plan, Seen
from tests.node.kubelet import Container
from tests.node.swapping import RUN

HAPPENS_WITHIN_S: Final = 10.0
LOOK_EVERY_S: Final = 0.001
KILL: Final = signal.SIGKILL
HANG_A_WHILE: Final[list[dict[str, object]]] = [{"point": "restore.told", "action": "hang"}]
"""A hang in the middle of a swap, which the swap's deadline ends."""
Scene = Callable[[Ground, Case], Seen]


def pids_of(ground: Ground, *words: str) -> list[int]:
    """Returns processes of the node, as the host numbers them, whose command line has all
    `words`.
    """
    found = []
    # A single hierarchy is enough, and quick enough to see a process that lives for 50 ms.
    procs = ground.node.cgroups[0].rglob("cgroup.procs")
    for pid in {pid for path in procs for pid in path.read_text().split()}:
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            if all(word in command for word in words):
                found.append(int(pid))
    return found


def when_there(ground: Ground, *words: str) -> list[int]:
    """Wait for such a process. Raises Missed: on a busy machine it can come and go unseen."""
    deadline = time.monotonic() + HAPPENS_WITHIN_S
    while not (found := pids_of(ground, *words)):
        if time.monotonic() > deadline:
            raise Missed(f"there is no process {words}")
        time.sleep(LOOK_EVERY_S)
    return found


def send(pids: list[int], number: signal.Signals) -> None:
    """Send a signal to each process that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def criu_at_restore(number: signal.Signals) -> Scene:
    """Sends CRIU a signal during the restore."""

    def scene(ground: Ground, case: Case) -> Seen:
        def during(_: Container) -> None:
            send(when_there(ground, "criu", "swrk"), number)

        return restoring.run(ground, case, Plan(during=during))

    return scene


def shim_at_restore(number: signal.Signals) -> Scene:
    """Sends quickthaw-runc a signal while CRIU restores."""

    def scene(ground: Ground, case: Case) -> Seen:
        def during(container: Container) -> None:
            when_there(ground, "criu", "swrk")
            send(_front(ground, container), number)

        return restoring.run(ground, case, Plan(during=during))

    return scene


def _front(ground: Ground, container: Container) -> list[int]:
    """Returns quickthaw-runc and not its guard, which has the same command line and is its
    child.
    """
    found = pids_of(ground, "front.py", " create ", container.id)
    return [pid for pid in found if _parent(pid) not in found]


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return procfs.parent(pid)
    return 0


def _is_init(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return procfs.numbers(pid)[-1] == 1
    return False


def restored_process(ground: Ground, case: Case) -> Seen:
    """Kills the restored init during the resume call."""

    def during(container: Container) -> None:
        when_there(ground, "sleep 60")
        for procs in ground.node.cgroups[0].rglob(f"{container.id}/cgroup.procs"):
            send([pid for pid in map(int, procs.read_text().split()) if _is_init(pid)], KILL)

    resume = {"quickthaw.io/resume": "exec:sleep 60"}
    return restoring.run(ground, case, Plan(annotations={**RESTORE, **resume}, during=during))


def page_server(number: signal.Signals, point: str) -> Scene:
    """Sends the page server a signal at a fault point that holds the server."""

    def scene(ground: Ground, case: Case) -> Seen:
        def strike(container: Container) -> None:
            send(_named(ground, container, "quickthaw-pages"), number)

        plan = Plan(faults=[{"point": point, "action": "hang"}])
        if point == "memory.filling":
            plan.when_started, plan.had_run = strike, True
        else:
            plan.during = strike
        return restoring.run(ground, case, plan)

    return scene


def its_guard(number: signal.Signals) -> Scene:
    """Sends the guard of a page server a signal; the server goes on."""

    def scene(ground: Ground, case: Case) -> Seen:
        def during(container: Container) -> None:
            send(_named(ground, container, "quickthaw-guard"), number)

        return restoring.run(ground, case, Plan(during=during))

    return scene


def _named(ground: Ground, container: Container, name: str) -> list[int]:
    """Waits for the page server: a fork of quickthaw-runc with a name of its own."""
    deadline = time.monotonic() + HAPPENS_WITHIN_S
    while time.monotonic() < deadline:
        named = [pid for pid in pids_of(ground, "front.py", container.id) if comm(pid) == name]
        # A guard has its server's name until it has given itself a name.
        if found := [pid for pid in named if _parent(pid) not in named]:
            return found
        time.sleep(LOOK_EVERY_S)
    raise WentWrong(f"there is no {name}")


def comm(pid: int) -> str:
    with contextlib.suppress(OSError):
        return procfs.comm(pid).decode(errors="replace")
    return ""


def daemon(ground: Ground, case: Case) -> Seen:
    """Kills or stops quickthawd, at the moment that the case names."""
    stopped = "stopped" in case.fault
    number = signal.SIGSTOP if stopped else signal.SIGKILL

    def strike(*_: object) -> None:
        send([ground.node.daemon_pid], number)

    plan = Plan()
    if "before create" in case.fault:
        plan.before_create = strike
    elif "between" in case.fault:
        plan.before_start = strike
    else:
        plan.during = strike
    try:
        return restoring.run(ground, case, plan)
    finally:
        ground.restart_daemon()


def containerd_restarts(ground: Ground, case: Case) -> Seen:
    """Restarts containerd while a swap hangs; kubelet must then repeat StartContainer."""

    def during(container: Container) -> None:
        told = ground.node.path(f"{RUN}/control/{container.id}/restored.json")
        ground.wait(told.exists, "the swap does not get there", HAPPENS_WITHIN_S)
        ground.node.restart_containerd()

    return restoring.run(ground, case, Plan(during=during, faults=HANG_A_WHILE))
