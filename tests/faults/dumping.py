"""Faults from outside: during a capture."""

import signal

from tests.faults import capturing
from tests.faults.cases import Case
from tests.faults.ground import STAGING, Ground, WentWrong
from tests.faults.processes import HAPPENS_WITHIN_S, Scene, send, when_there
from tests.faults.restoring import Seen
from tests.faults.shortage import small_tmpfs
from tests.node.kubelet import Pod
from tests.node.swapping import ask, first_answer


def criu_at_dump(number: signal.Signals) -> Scene:
    """Sends CRIU a signal during the dump."""

    def scene(ground: Ground, case: Case) -> Seen:
        return capturing.disturbed(
            ground, case, lambda _: send(when_there(ground, "criu", "swrk"), number)
        )

    return scene


def daemon_at_dump(ground: Ground, case: Case) -> Seen:
    """Kills quickthawd, or stops it for a while, when the source is frozen."""
    number = signal.SIGKILL if "killed" in case.fault else signal.SIGSTOP

    def disturb(_: Pod) -> None:
        when_there(ground, "criu", "swrk")
        send([ground.node.daemon_pid], number)

    return capturing.disturbed(ground, case, disturb, hangs=number is signal.SIGSTOP)


def containerd_at_dump(ground: Ground, case: Case) -> Seen:
    """Restarts containerd when the source is frozen."""

    def disturb(_: Pod) -> None:
        when_there(ground, "criu", "swrk")
        ground.node.restart_containerd()

    return capturing.disturbed(ground, case, disturb)


def store_is_full(ground: Ground, case: Case) -> Seen:
    """Gives the directory of captures in progress room for a part of the capture."""
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
    """Kills the container during the dump; kubelet starts it again."""

    def disturb(pod: Pod) -> None:
        when_there(ground, "criu", "swrk")
        send([pod.container().host_pid], signal.SIGKILL)

    return capturing.source_killed(ground, case, disturb)
