"""Faults from outside: room, memory, mounts, a network or the clock are not as they should be."""

import contextlib
import os
import signal
from collections.abc import Iterator

from tests.faults import capturing, restoring
from tests.faults.cases import Case
from tests.faults.ground import IN_SHM, PATIENT_S, RESTORE, STAGING, Ground, WentWrong
from tests.faults.restoring import Plan, Seen
from tests.node.kubelet import Container, Pod
from tests.node.podspec import HostPath, VolumeMount
from tests.node.swapping import RUN


@contextlib.contextmanager
def small_tmpfs(ground: Ground, inside: str, size: str) -> Iterator[None]:
    """Mounts a file system of `size` over a directory of the node, with the directory's content."""
    ground.node.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", inside])
    try:
        yield
    finally:
        ground.node.run(["umount", "--lazy", inside])


def run_is_full(ground: Ground, case: Case) -> Seen:
    """Leaves room for the container's directory, and none for CRIU's view of the images."""
    with small_tmpfs(ground, f"{RUN}/containers", "16k"):
        return restoring.run(ground, case)


def shm_is_full(ground: Ground, case: Case) -> Seen:
    """Leaves the pod's /dev/shm no room for the captured files."""
    filler = []

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
    """Gives a file with other content the name of a file of the snapshot."""

    def before_start(container: Container) -> None:
        restoring.shm_file(container.pod).write_text("somebody's")

    def when_running(pod: Pod) -> None:
        if restoring.shm_file(pod).read_text() != "somebody's":
            raise WentWrong(f"{IN_SHM} of the pod was changed")
        restoring.shm_file(pod).unlink()

    plan = Plan(before_start=before_start, when_running=when_running)
    return restoring.run(ground, case, plan)


def memory_too_small(ground: Ground, case: Case) -> Seen:
    """Sets a limit that suffices for a cold start, and is below the captured use."""
    spec = ground.spec(memory_limit_bytes=32 << 20)
    return restoring.run(ground, case, Plan(spec=spec))


def mount_is_missing(ground: Ground, case: Case) -> Seen:
    """Removes a host path that a container mounts between its create and its start, and brings it
    back.
    """
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
    """Removes the name of the sandbox's network namespace before the start of the container.

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
    """Moves the times of the snapshot's files, because the clock is the whole machine's.

    restored.json has the time of the process's absence; an hour ahead must not become negative.
    """
    for path in ground.snapshot.directory.rglob("*"):
        status = path.lstat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 3600 * 10**9),
                 follow_symlinks=False)  # fmt: skip
    return restoring.run(ground, case)


def _staged(ground: Ground) -> list[str]:
    return os.listdir(ground.node.path(STAGING))
