"""A case of a capture: the source goes on whatever happens, and each published snapshot is
whole.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Final

from tests.faults.ground import CAPTURE_S, PATIENT_S, STAGING, Ground
from tests.faults.restoring import Seen
from tests.node.swapping import QUICKTHAW, SNAPSHOTS, ask, first_answer, is_restored, wishes

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.cases import Case
    from tests.node.kubelet import Pod

CALLS: Final = {"quiesce": "http POST :8000/quiesce", "resume": "http POST :8000/resume"}
WISHES: Final = wishes(**CALLS)
HAPPENS_WITHIN_S: Final = 20.0
RECOVERED_WITHIN_S: Final = PATIENT_S + 10.0
MUCH_MIB: Final = 150
"""Memory whose dump takes long enough to be disturbed."""


def run(ground: Ground, case: Case) -> Seen:
    """Run a whole case. Raises WentWrong, AssertionError."""
    if case.phase.startswith("store.remove"):
        return _removal(ground, case)
    ground.arm(case.armed())
    ground.restart_daemon()
    before = published(ground)
    pod = source(ground, case)
    nonce = first_answer(pod)["nonce"]
    if case.fault == "hang":
        ground.wait(lambda: case_began(ground, pod), "no capture began", HAPPENS_WITHIN_S)
        time.sleep(CAPTURE_S + 1)
    else:
        ground.wait(lambda: over(ground, pod), "nothing happens", HAPPENS_WITHIN_S)
    return recovered(ground, pod, nonce, before)


def source(ground: Ground, case: Case, **fields: str) -> Pod:
    """Starts a pod whose capture begins as soon as the pod answers."""
    wanted = wishes(**{**CALLS, **fields}) | ground.marks
    return ground.node.kubelet.run_pod("source", [ground.spec(case.name)], annotations=wanted)


def disturbed(
    ground: Ground, case: Case, disturb: Callable[[Pod], None], *, hangs: bool = False
) -> Seen:
    """Capture a pod with much memory, and call `disturb` when its dump is about to begin.

    hangs: nothing will be said about the end of the capture.
    """
    before = published(ground)
    pod, nonce = _big_source(ground, case, disturb)
    if hangs:
        time.sleep(CAPTURE_S + 1)
    else:
        ground.wait(lambda: over(ground, pod), "nothing happens", HAPPENS_WITHIN_S)
    return recovered(ground, pod, nonce, before)


def source_killed(ground: Ground, case: Case, kill: Callable[[Pod], None]) -> Seen:
    """Run the case of a source that dies: kubelet starts the source again, and the daemon captures
    that attempt.
    """
    before = published(ground)
    pod, _ = _big_source(ground, case, kill)
    pod.container().restart()
    nonce = first_answer(pod)["nonce"]
    ask(pod, "/ready")
    return recovered(ground, pod, nonce, before)


def _big_source(ground: Ground, case: Case, disturb: Callable[[Pod], None]) -> tuple[Pod, str]:
    ground.restart_daemon()
    pod = source(ground, case, capture_when="signal")
    nonce = first_answer(pod)["nonce"]
    ask(pod, f"/allocate?mib={MUCH_MIB}")
    ask(pod, "/ready")
    disturb(pod)
    return pod, nonce


def recovered(ground: Ground, pod: Pod, nonce: str, before: set[str]) -> Seen:
    """Check after the fault: the next daemon makes the snapshot, and the next pod starts from
    it.
    """
    seen = Seen(source_state=ground.state_of(pod, nonce))
    ground.disarm()
    ground.restart_daemon(capture_s=PATIENT_S)
    ground.wait(
        lambda: published(ground) - before and not os.listdir(ground.node.path(STAGING)),
        "there is no snapshot when the fault is over", RECOVERED_WITHIN_S,
    )  # fmt: skip
    seen.source_state = ground.state_of(pod, nonce) if seen.source_state == "serves" else (
        seen.source_state
    )  # fmt: skip
    if (calls := ask(pod, "/called"))[-1:] == ["quiesce"]:
        seen.wrong.append(f"the source was left quiesced: {calls}")
    replica = ground.node.kubelet.run_pod(
        "replica", pod.spec.containers,
        annotations={"quickthaw.io/restore": "auto", **ground.marks},
    )  # fmt: skip
    seen.outcome = "restored" if first_answer(replica)["nonce"] == nonce else "cold"
    if (seen.outcome == "restored") != is_restored(replica.container()):
        seen.wrong.append("the marker of the replica does not say how it started")
    for each in (replica, pod):
        seen.wrong += ground.not_right(each)
        each.remove(grace_s=0)
    made = published(ground) - before
    if len(made) != 1:
        seen.wrong.append(f"{len(made)} snapshots were published")
    forget(ground, made)
    return seen


def published(ground: Ground) -> set[str]:
    """Returns the names in the store."""
    return set(os.listdir(ground.node.path(SNAPSHOTS)))


def forget(ground: Ground, names: set[str]) -> None:
    """Delete snapshots as a person does."""
    for name in names:
        ground.node.run([QUICKTHAW, "rm", name])


def case_began(ground: Ground, pod: Pod) -> bool:
    """Returns whether the capture of the pod has a staging directory, or is further than that."""
    return bool(os.listdir(ground.node.path(STAGING))) or over(ground, pod)


def over(ground: Ground, pod: Pod) -> bool:
    """Returns whether the capture of the pod, or its daemon, has ended in some way."""
    short = f"({pod.container().id[:12]})"
    told = [line for line in ground.node.journal().splitlines() if short in line]
    ends = ("captured as ", "no snapshot was made")
    return ground.daemon_dead or any(end in line for line in told for end in ends)


def _removal(ground: Ground, case: Case) -> Seen:
    before = published(ground)
    ground.arm(case.armed())
    ground.restart_daemon(capture_s=PATIENT_S)
    pod = source(ground, case)
    nonce = first_answer(pod)["nonce"]
    ground.wait(lambda: over(ground, pod), "it is not captured", HAPPENS_WITHIN_S)
    (name,) = published(ground) - before
    pod.remove(grace_s=0)
    ground.node.call([QUICKTHAW, "rm", name])
    ground.disarm()
    ground.restart_daemon()
    seen = Seen()
    if staged := os.listdir(ground.node.path(STAGING)):
        seen.wrong.append(f"staging has {staged}")
    replica = ground.node.kubelet.run_pod(
        "replica", pod.spec.containers,
        annotations={"quickthaw.io/restore": "auto", **ground.marks},
    )  # fmt: skip
    seen.outcome = "restored" if first_answer(replica)["nonce"] == nonce else "cold"
    there = name in published(ground)
    if there != (seen.outcome == "restored"):
        seen.wrong.append(f"the snapshot is {'there' if there else 'gone'}: {seen.outcome}")
    replica.remove(grace_s=0)
    forget(ground, published(ground) - before)
    return seen
