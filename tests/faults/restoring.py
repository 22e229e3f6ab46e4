"""A case of a restore: a pod starts as under kubelet, a fault strikes, the pod runs."""

import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc

from protos import cri_pb2 as pb
from tests.faults.cases import COLD, KILLED, RESTORED, Case
from tests.faults.ground import BUNDLES, IN_SHM, RESTORE, Ground, WentWrong
from tests.node.kubelet import Container, Pod
from tests.node.podspec import ContainerSpec
from tests.node.swapping import SNAPSHOTS, answer, ask, first_answer, is_restored, runtime_log

TRIES: Final = 4
BACK_OFF_S: Final = 1.0
"""Between two attempts. kubelet waits 10 s after the first, and longer after each."""
ANSWERS_WITHIN_S: Final = 20.0
STARTED_WITHIN_S: Final = 60.0
EXIT_CODE: Final = 7
_LOG_LINE: Final = re.compile(r"\d{8} ")
Disturb = Callable[[Container], None]


@dataclass(slots=True)
class Seen:
    """The outcome of a case. wrong: failures of requirements on the system."""

    outcome: str = ""
    source_state: str = "serves"
    reason: str = ""
    wrong: list[str] = field(default_factory=list)
    tries: list[str] = field(default_factory=list)
    """The errors that kubelet got from the failed attempts."""


@dataclass(slots=True)
class Plan:
    """The special actions of a case.

    during: called while StartContainer runs, first attempt. when_started: after StartContainer,
    before the first answer. after_failure: after the failure of the first attempt. when_running:
    when the pod runs, before its check: undoes changes that the check would take for left-overs.
    after: after the check. faults: armed beside the case's own. had_run: the attempt that failed
    had a running process.
    """

    annotations: dict[str, str] = field(default_factory=lambda: dict(RESTORE))
    spec: ContainerSpec | None = None
    before_create: Callable[[Pod], None] | None = None
    before_start: Disturb | None = None
    during: Disturb | None = None
    when_started: Disturb | None = None
    drop_ipv6: bool = False
    faults: list[dict[str, object]] = field(default_factory=list)
    had_run: bool = False
    after_failure: Callable[[Pod], None] | None = None
    when_running: Callable[[Pod], None] | None = None
    after: Callable[[Pod], None] | None = None


def start(ground: Ground, plan: Plan, seen: Seen) -> Pod:
    """Start a pod until its container answers. Raises WentWrong when the pod is stuck."""
    kubelet, spec = ground.node.kubelet, plan.spec or ground.spec()
    wanted = {**plan.annotations, **ground.marks}
    pod = kubelet.make_pod("replica", [spec], annotations=wanted)
    pod.run_sandbox()
    if plan.before_create:
        plan.before_create(pod)
    deadline = time.monotonic() + STARTED_WITHIN_S
    while not _attempt(ground, pod, plan, seen):
        if len(seen.tries) == TRIES or time.monotonic() > deadline:
            raise WentWrong(f"the pod is stuck: {seen.tries}")
    if plan.when_running:
        plan.when_running(pod)
    _judge(ground, pod, plan, seen)
    return pod


def _attempt(ground: Ground, pod: Pod, plan: Plan, seen: Seen) -> bool:
    """Run a turn of kubelet's loop. Returns False when another turn is needed."""
    container, first = pod.container(), not seen.tries
    try:
        container.create()
        if first and plan.drop_ipv6:
            _drop_ipv6(pod)
        if first and plan.before_start:
            plan.before_start(container)
        _start(container, plan.during if first else None)
        if first and plan.when_started:
            plan.when_started(container)
        first_answer(pod, within_s=0.1 if _ended(container) else ANSWERS_WITHIN_S)
        return True
    except (grpc.RpcError, OSError) as error:
        seen.tries.append(short(error))
        if container.id and _exists(container):
            if container.running:
                raise WentWrong(f"it runs and does not answer: {error!r}") from error
            container.attempt += 1
        time.sleep(BACK_OFF_S)
        if first and plan.after_failure:
            plan.after_failure(pod)
        return False


def _start(container: Container, during: Disturb | None) -> None:
    if during is None:
        container.start()
        return
    with ThreadPoolExecutor(1) as thread:
        starting = thread.submit(container.start)
        during(container)
        starting.result(STARTED_WITHIN_S)


def _exists(container: Container) -> bool:
    try:
        return bool(container.status())
    except grpc.RpcError:
        return False


def _ended(container: Container) -> bool:
    return bool(container.status().state == pb.CONTAINER_EXITED)


def short(error: BaseException) -> str:
    """Returns the message that kubelet would write into an event."""
    return str(error.details() if isinstance(error, grpc.Call) else repr(error))[:300]


def _judge(ground: Ground, pod: Pod, plan: Plan, seen: Seen) -> None:
    """Record the outcome, and check that the container fits the outcome."""
    state = first_answer(pod)
    restored = state["nonce"] == ground.snapshot.nonce
    seen.wrong += ground.not_right(pod)
    seen.outcome = KILLED if seen.tries else RESTORED if restored else COLD
    if restored != is_restored(pod.container()):
        seen.wrong.append(f"restored is {restored}, and the marker says the opposite")
    if restored:
        if seen.tries:
            seen.wrong.append("the attempt after a failed one was restored")
        if not ask(pod, "/restored"):
            seen.wrong.append("restored, and there is no restored.json")
        return
    if state["hostname"] != pod.spec.name:
        seen.wrong.append(f"its host name is {state['hostname']}")
    seen.wrong += _not_cold(ground, pod, inherits_shm=plan.had_run)


def _not_cold(ground: Ground, pod: Pod, *, inherits_shm: bool) -> list[str]:
    """Returns the differences between the container and a container without a swap.

    inherits_shm: an earlier attempt ran; its files in the pod's /dev/shm are still there, as after
    any container that ended.
    """
    found = ground.facts(pod)
    left_out = {"mounts", *(["/dev/shm"] if inherits_shm else [])}
    wrong = [
        f"{name} is {value!r:.300}, at a cold start {ground.cold[name]!r:.300}"
        for name, value in found.items()
        if name not in left_out and value != ground.cold[name]
    ]
    bundle = f"{BUNDLES}/{pod.container().id}/rootfs"
    wrong += [
        f"the root file system has the snapshot's diff: {line}"
        for line in Path(f"/proc/{ground.node.pid}/mountinfo").read_text().splitlines()
        if f" {bundle} " in line and SNAPSHOTS in line
    ]
    if unknown := _strange_lines(pod.container()):
        wrong.append(f"its log has lines that are not its own: {unknown}")
    inside = ["nsenter", f"--net={network_namespace(pod)}", "ip", "address", "show"]
    if f" {(old := ground.source.ips[1])}/" in ground.node.run(inside):
        wrong.append(f"its network has the captured address {old}")
    return wrong


def _strange_lines(container: Container) -> list[str]:
    """Returns foreign lines in the container's log, except runc's about its restore.

    runc writes its final error both to its own log and to its standard error. That is the
    container's, and has to be: the restored process inherits it.
    """
    log = runtime_log(container)
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    runtimes = {"", *(line for each in records for line in str(each["msg"]).splitlines())}
    lines = [line.text for line in container.log_lines() if not _LOG_LINE.match(line.text)]
    return [line for line in lines if line not in runtimes]


def network_namespace(pod: Pod) -> str:
    """Returns the path of the sandbox's network namespace, once a container was created."""
    namespaces = pod.container().info()["runtimeSpec"]["linux"]["namespaces"]
    (path,) = [str(each["path"]) for each in namespaces if each["type"] == "network"]
    return path


def _drop_ipv6(pod: Pod) -> None:
    """Removes the IPv6 address on which the captured process listens, so that the hook has work."""
    inside = ["nsenter", f"--net={network_namespace(pod)}", "ip", "-6", "address", "flush"]
    pod.node.run([*inside, "dev", "eth0", "scope", "global"])


def end(pod: Pod, seen: Seen) -> None:
    """Ends the container with an exit code of its own, and removes the pod."""
    try:
        answer(pod, f"/exit?code={EXIT_CODE}")
    except OSError:
        pass
    except Exception as error:  # noqa: BLE001 - http.client's many ways to say that it hung up
        if "closed connection" not in str(error) and "BadStatusLine" not in repr(error):
            seen.wrong.append(f"asked to end: {error!r}")
    ended = pod.container().wait_exit(timeout_s=20)
    if ended.exit_code != EXIT_CODE:
        seen.wrong.append(f"its exit code is {ended.exit_code}, not {EXIT_CODE}")
    pod.remove(grace_s=0)


def run(ground: Ground, case: Case, plan: Plan | None = None) -> Seen:
    """Run a whole case: arm, start, end, disarm. Raises WentWrong."""
    plan, seen = plan or Plan(), Seen()
    plan.drop_ipv6 = plan.drop_ipv6 or case.kind == "hook"
    plan.had_run = plan.had_run or case.is_after_success
    ground.arm([*case.armed(), *plan.faults])
    in_daemon = case.kind == "daemon"
    if in_daemon:
        ground.restart_daemon()
    try:
        pod = start(ground, plan, seen)
        if plan.after:
            plan.after(pod)
        end(pod, seen)
    finally:
        ground.disarm()
        if in_daemon or ground.daemon_dead:
            ground.restart_daemon()
    seen.source_state = ground.state_of(ground.source, ground.snapshot.nonce)
    return seen


def shm_file(pod: Pod) -> Any:
    """Returns the pod's /dev/shm entry that the snapshot brings, as the host's path."""
    sandbox = f"/run/containerd/io.containerd.grpc.v1.cri/sandboxes/{pod.sandbox_id}/shm"
    return pod.node.path(f"{sandbox}/{IN_SHM.rpartition('/')[2]}")
