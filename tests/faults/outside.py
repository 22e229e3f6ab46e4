"""Faults from outside: what others on a node do to CRIU, our processes, the store and the pod."""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from tests.faults import capturing, restoring
from tests.faults.cases import Case
from tests.faults.ground import IN_SHM, PATIENT_S, RESTORE, STAGING, Ground, Missed, WentWrong
from tests.faults.restoring import Plan, Seen
from tests.node.kubelet import Container, Pod
from tests.node.podspec import HostPath, VolumeMount
from tests.node.swapping import RUN, ask, first_answer

HAPPENS_WITHIN_S: Final = 10.0
LOOK_EVERY_S: Final = 0.001
_KILL: Final = signal.SIGKILL
_HANG_A_WHILE: Final[list[dict[str, object]]] = [{"point": "restore.told", "action": "hang"}]
"""For what is to happen in the middle of a swap: its deadline ends it."""
Scene = Callable[[Ground, Case], Seen]


def run(ground: Ground, case: Case) -> Seen:
    """A whole case, and everything put back. Raises WentWrong, AssertionError."""
    try:
        return SCENES[case.phase, case.fault](ground, case)
    finally:
        if case.phase in _DAMAGE_SNAPSHOT:
            ground.mend_snapshot()


# Processes


def pids_of(ground: Ground, *words: str) -> list[int]:
    """Processes of the node, as the host numbers them, whose command line has all `words`."""
    found = []
    # One hierarchy is enough, and quick enough to see a process that lives for 50 ms.
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
    """A signal to each that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def criu_at_restore(number: signal.Signals) -> Scene:
    """CRIU gets a signal while it restores."""

    def scene(ground: Ground, case: Case) -> Seen:
        def during(_: Container) -> None:
            send(when_there(ground, "criu", "swrk"), number)

        return restoring.run(ground, case, Plan(during=during))

    return scene


def shim_at_restore(number: signal.Signals) -> Scene:
    """quickthaw-runc gets a signal while CRIU restores."""

    def scene(ground: Ground, case: Case) -> Seen:
        def during(container: Container) -> None:
            when_there(ground, "criu", "swrk")
            send(_front(ground, container), number)

        return restoring.run(ground, case, Plan(during=during))

    return scene


def _front(ground: Ground, container: Container) -> list[int]:
    """quickthaw-runc and not its guard, which has the same command line and is its child."""
    found = pids_of(ground, "front.py", " create ", container.id)
    return [pid for pid in found if _parent(pid) not in found]


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _is_init(pid: int) -> bool:
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return any(line.startswith("NSpid:") and line.split()[-1] == "1" for line in lines)
    return False


def restored_process(ground: Ground, case: Case) -> Seen:
    """The restored init dies while the resume call is under way."""

    def during(container: Container) -> None:
        when_there(ground, "sleep 60")
        for procs in ground.node.cgroups[0].rglob(f"{container.id}/cgroup.procs"):
            send([pid for pid in map(int, procs.read_text().split()) if _is_init(pid)], _KILL)

    resume = {"quickthaw.io/resume": "exec:sleep 60"}
    return restoring.run(ground, case, Plan(annotations={**RESTORE, **resume}, during=during))


def page_server(number: signal.Signals, point: str) -> Scene:
    """The page server gets a signal when it has come to a fault point, where it is held."""

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
    """The guard of a page server gets a signal; the server goes on."""

    def scene(ground: Ground, case: Case) -> Seen:
        def during(container: Container) -> None:
            send(_named(ground, container, "quickthaw-guard"), number)

        return restoring.run(ground, case, Plan(during=during))

    return scene


def _named(ground: Ground, container: Container, name: str) -> list[int]:
    """Waits for it: the process is a fork of quickthaw-runc with a name of its own."""
    deadline = time.monotonic() + HAPPENS_WITHIN_S
    while time.monotonic() < deadline:
        named = [pid for pid in pids_of(ground, "front.py", container.id) if _comm(pid) == name]
        # A guard is called like its server until it has given itself a name.
        if found := [pid for pid in named if _parent(pid) not in named]:
            return found
        time.sleep(LOOK_EVERY_S)
    raise WentWrong(f"there is no {name}")


def _comm(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


# The daemon and containerd


def daemon(ground: Ground, case: Case) -> Seen:
    """quickthawd is killed or stopped, at the moment that the case names."""
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
    """containerd is restarted while a swap hangs; StartContainer is then kubelet's to repeat."""

    def during(container: Container) -> None:
        told = ground.node.path(f"{RUN}/control/{container.id}/restored.json")
        ground.wait(told.exists, "the swap does not get there", HAPPENS_WITHIN_S)
        ground.node.restart_containerd()

    return restoring.run(ground, case, Plan(during=during, faults=_HANG_A_WHILE))


# The snapshot


def damaged(damage: Callable[[Path], None]) -> Scene:
    """Something happens to the snapshot before the pod is created."""

    def scene(ground: Ground, case: Case) -> Seen:
        damage(ground.snapshot.directory)
        return restoring.run(ground, case)

    return scene


def _truncate(directory: Path) -> None:
    image = directory / "criu" / "pages-1.img"
    os.truncate(image, image.stat().st_size // 2)


def _flip(directory: Path) -> None:
    """One bit, with size and times as they were."""
    _flip_bit(directory / "criu" / "pages-1.img")


def _flip_memory(directory: Path) -> None:
    _flip_bit(directory / "memory" / "space-1.data")


def _flip_bit(image: Path) -> None:
    status = image.stat()
    with image.open("r+b") as file:
        file.seek(status.st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))


def memory_damaged(ground: Ground, case: Case) -> Seen:
    """It may be found after the first answer: nobody asks before all was looked at."""

    def when_started(container: Container) -> None:
        ground.wait(
            lambda: not [pid for pid in pids_of(ground, container.id) if "pages" in _comm(pid)],
            "the page server goes on", HAPPENS_WITHIN_S,
        )  # fmt: skip

    _flip_memory(ground.snapshot.directory)
    return restoring.run(ground, case, Plan(when_started=when_started, had_run=True))


def _remove_image(directory: Path) -> None:
    next((directory / "criu").glob("core-*.img")).unlink()


def _truncate_manifest(directory: Path) -> None:
    os.truncate(directory / "manifest.json", 100)


def _remove_diff(directory: Path) -> None:
    shutil.rmtree(directory / "rootfs")


def removed_while_read(ground: Ground, case: Case) -> Seen:
    """The images go when CRIU has begun."""

    def during(_: Container) -> None:
        when_there(ground, "criu", "swrk")
        for image in (ground.snapshot.directory / "criu").iterdir():
            image.unlink()

    return restoring.run(ground, case, Plan(during=during))


# What the pod and the node have


@contextlib.contextmanager
def small_tmpfs(ground: Ground, inside: str, size: str) -> Iterator[None]:
    """A file system of `size` over a directory of the node, with what was in it."""
    ground.node.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", inside])
    try:
        yield
    finally:
        ground.node.run(["umount", "--lazy", inside])


def run_is_full(ground: Ground, case: Case) -> Seen:
    """There is room for the container's directory, and none for CRIU's view of the images."""
    with small_tmpfs(ground, f"{RUN}/containers", "16k"):
        return restoring.run(ground, case)


def shm_is_full(ground: Ground, case: Case) -> Seen:
    """The pod's /dev/shm has no room for what the captured one held."""
    filler: list[Path] = []

    def before_start(container: Container) -> None:
        shm = restoring.shm_file(container.pod).parent
        room = os.statvfs(shm)
        filler.append(shm / "filler")
        os.posix_fallocate(
            fd := os.open(filler[0], os.O_CREAT | os.O_WRONLY), 0, room.f_bavail * room.f_frsize
        )
        os.close(fd)

    return restoring.run(
        ground, case, Plan(before_start=before_start, when_running=lambda _: filler[0].unlink())
    )


def shm_is_taken(ground: Ground, case: Case) -> Seen:
    """A file of another content has the name of one of the snapshot's."""

    def before_start(container: Container) -> None:
        restoring.shm_file(container.pod).write_text("somebody's")

    def when_running(pod: Pod) -> None:
        if restoring.shm_file(pod).read_text() != "somebody's":
            raise WentWrong(f"{IN_SHM} of the pod was changed")
        restoring.shm_file(pod).unlink()

    plan = Plan(before_start=before_start, when_running=when_running)
    return restoring.run(ground, case, plan)


def memory_too_small(ground: Ground, case: Case) -> Seen:
    """The new pod's limit is enough for a cold start, and below what was captured."""
    spec = ground.spec(memory_limit_bytes=32 << 20)
    return restoring.run(ground, case, Plan(spec=spec))


def mount_is_missing(ground: Ground, case: Case) -> Seen:
    """A host path that a container mounts goes between its create and its start, and is back."""
    path = ground.node.path("/srv/of-the-pod")
    path.mkdir(exist_ok=True)
    spec = ground.spec("mount", mounts=[VolumeMount("/srv", HostPath("/srv/of-the-pod"))])
    before = capturing.published(ground)
    ground.restart_daemon(capture_s=PATIENT_S)
    pod = ground.node.kubelet.run_pod("first", [spec], annotations=capturing.WISHES)
    ground.wait(
        lambda: capturing.published(ground) - before and not _staged(ground),
        "there is no snapshot", PATIENT_S,
    )  # fmt: skip
    pod.remove(grace_s=0)

    plan = Plan(
        spec=spec, before_start=lambda _: path.rmdir(), after_failure=lambda _: path.mkdir()
    )
    seen = restoring.run(ground, case, plan)
    capturing.forget(ground, capturing.published(ground) - before)
    path.rmdir()
    return seen


def netns_is_gone(ground: Ground, case: Case) -> Seen:
    """The sandbox's network namespace has lost its name when the container is started.

    runc cannot start anything there: kubelet makes a new sandbox, which here is a new pod.
    """
    seen = Seen()
    pod = ground.node.kubelet.make_pod("replica", [ground.spec()], annotations=RESTORE)
    pod.run_sandbox()
    container = pod.container()
    container.create()
    netns = restoring.network_namespace(pod)
    if netns.startswith("/proc/"):
        os.kill(ground.node.host_pid(int(netns.split("/")[2])), signal.SIGKILL)
    else:
        ground.node.run(["umount", "--lazy", netns])
    try:
        container.start()
    except Exception as error:  # noqa: BLE001 - how it fails is runc's affair
        seen.tries.append(restoring.short(error))
    if not container.running and not seen.tries:
        seen.wrong.append("StartContainer succeeded, and it does not run")
    pod.remove(grace_s=0)
    again = restoring.run(ground, case)
    again.wrong += seen.wrong
    if again.outcome != "restored":
        again.wrong.append(f"the pod after it is {again.outcome}")
    again.outcome, again.tries = ("killed" if seen.tries else "cold"), seen.tries
    return again


def clock_jumped(ground: Ground, case: Case) -> Seen:
    """The machine's clock is everybody's: instead of it the restored process' start is moved.

    restored.json tells how long the process was away; an hour ahead must not become negative.
    """
    for path in ground.snapshot.directory.rglob("*"):
        status = path.lstat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 3600 * 10**9),
                 follow_symlinks=False)  # fmt: skip
    return restoring.run(ground, case)


# Captures


def criu_at_dump(number: signal.Signals) -> Scene:
    """CRIU gets a signal while it dumps."""

    def scene(ground: Ground, case: Case) -> Seen:
        return capturing.disturbed(
            ground, case, lambda _: send(when_there(ground, "criu", "swrk"), number)
        )

    return scene


def daemon_at_dump(ground: Ground, case: Case) -> Seen:
    """quickthawd is killed, or stopped for a while, when the source is frozen."""
    number = signal.SIGKILL if "killed" in case.fault else signal.SIGSTOP

    def disturb(_: Pod) -> None:
        when_there(ground, "criu", "swrk")
        send([ground.node.daemon_pid], number)

    return capturing.disturbed(ground, case, disturb, hangs=number is signal.SIGSTOP)


def containerd_at_dump(ground: Ground, case: Case) -> Seen:
    """containerd is restarted when the source is frozen."""

    def disturb(_: Pod) -> None:
        when_there(ground, "criu", "swrk")
        ground.node.restart_containerd()

    return capturing.disturbed(ground, case, disturb)


def store_is_full(ground: Ground, case: Case) -> Seen:
    """Where a capture is put together there is room for a part of it."""
    before = capturing.published(ground)
    pod = capturing.source(ground, case, capture_when="signal")
    nonce = first_answer(pod)["nonce"]
    with small_tmpfs(ground, STAGING, "4m"):
        ask(pod, "/ready")
        ground.wait(lambda: capturing.over(ground, pod), "nothing happens", HAPPENS_WITHIN_S)
        if capturing.published(ground) - before:
            raise WentWrong("a capture that did not fit was published")
    return capturing.recovered(ground, pod, nonce, before)


def source_dies(ground: Ground, case: Case) -> Seen:
    """The container is killed while it is dumped; kubelet starts it again."""

    def disturb(pod: Pod) -> None:
        when_there(ground, "criu", "swrk")
        send([pod.container().host_pid], signal.SIGKILL)

    return capturing.source_killed(ground, case, disturb)


def _staged(ground: Ground) -> list[str]:
    return os.listdir(ground.node.path(STAGING))


_DAMAGE_SNAPSHOT: Final = (
    "restore: images", "restore: manifest", "restore: rootfs diff", "restore: clock",
    "restore: memory",
)  # fmt: skip
SCENES: Final[dict[tuple[str, str], Scene]] = {
    ("restore: CRIU", "killed"): criu_at_restore(signal.SIGKILL),
    ("restore: CRIU", "stopped"): criu_at_restore(signal.SIGSTOP),
    ("restore: quickthaw-runc", "killed"): shim_at_restore(signal.SIGKILL),
    ("restore: quickthaw-runc", "stopped"): shim_at_restore(signal.SIGSTOP),
    ("restore: page server", "killed before the processes run"): page_server(
        signal.SIGKILL, "memory.started"
    ),
    ("restore: page server", "stopped before the processes run"): page_server(
        signal.SIGSTOP, "memory.started"
    ),
    ("restore: page server", "killed while it fills"): page_server(
        signal.SIGKILL, "memory.filling"
    ),
    ("restore: page server", "stopped while it fills"): page_server(
        signal.SIGSTOP, "memory.filling"
    ),
    ("restore: its guard", "killed"): its_guard(signal.SIGKILL),
    ("restore: its guard", "stopped"): its_guard(signal.SIGSTOP),
    ("restore: memory", "bit flipped"): memory_damaged,
    ("restore: restored process", "killed before resume"): restored_process,
    ("restore: daemon", "killed between create and start"): daemon,
    ("restore: daemon", "killed during the swap"): daemon,
    ("restore: daemon", "stopped before create"): daemon,
    ("restore: daemon", "stopped between create and start"): daemon,
    ("restore: containerd", "restarted during the swap"): containerd_restarts,
    ("restore: images", "truncated"): damaged(_truncate),
    ("restore: images", "bit flipped"): damaged(_flip),
    ("restore: images", "a file removed"): damaged(_remove_image),
    ("restore: images", "removed while they are read"): removed_while_read,
    ("restore: manifest", "truncated"): damaged(_truncate_manifest),
    ("restore: rootfs diff", "removed"): damaged(_remove_diff),
    ("restore: /run/quickthaw", "full"): run_is_full,
    ("restore: /dev/shm", "full"): shm_is_full,
    ("restore: /dev/shm", "a name is taken"): shm_is_taken,
    ("restore: memory limit", "too small"): memory_too_small,
    ("restore: mount", "its source is missing"): mount_is_missing,
    ("restore: network namespace", "gone"): netns_is_gone,
    ("restore: clock", "the snapshot is of the future"): clock_jumped,
    ("capture: CRIU", "killed"): criu_at_dump(signal.SIGKILL),
    ("capture: CRIU", "stopped"): criu_at_dump(signal.SIGSTOP),
    ("capture: daemon", "killed while CRIU dumps"): daemon_at_dump,
    ("capture: daemon", "stopped while frozen"): daemon_at_dump,
    ("capture: containerd", "restarted while CRIU dumps"): containerd_at_dump,
    ("capture: store", "full"): store_is_full,
    ("capture: source", "killed while CRIU dumps"): source_dies,
}
