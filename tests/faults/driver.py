"""Cases of containers that use GPUs, on a node with the stand-in for the CUDA driver."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from tests.faults import capturing, restoring
from tests.faults.ground import CAPTURE_S, Ground
from tests.faults.restoring import Plan, Seen
from tests.node.gpus import SHARED_MEMORY, fault, gpu_probe, in_use
from tests.node.swapping import ask, first_answer

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.cases import Case
    from tests.faults.processes import Scene
    from tests.node.kubelet import Pod
    from tests.node.podspec import ContainerSpec

ENDS_WITHIN_S: Final = 30.0
MIB: Final = 8


def two_processes(case: str, mib: int, **fields: Any) -> ContainerSpec:
    """Returns the workload: two processes with so much memory on a GPU each."""
    env = {"CASE": case, "CHILDREN": "1", "MIB": str(mib), **SHARED_MEMORY}
    return gpu_probe(0, 1, env=env, **fields)


class GpuGround(Ground):
    """One whose workload has two processes with memory on a GPU each."""

    mib = MIB

    @staticmethod
    def spec(case: str = "", **fields: Any) -> ContainerSpec:
        return two_processes(case or "shared", MIB, **fields)

    def not_right(self, pod: Pod) -> list[str]:
        """Memory on a GPU that is not what it was."""
        found = ask(pod, "/gpu")
        wrong = [f"on its GPUs: {found}"] if found["wrong"] or len(found["processes"]) != 2 else []
        if min(in_use(self.node).values()) < self.mib << 20:
            wrong.append(f"in use: {in_use(self.node)}")
        return wrong

    def state_of(self, pod: Pod, nonce: str) -> str:
        """Also whether it can use its GPUs."""
        told = super().state_of(pod, nonce)
        if told != "serves":
            return told
        try:
            return "; ".join(self.not_right(pod)) or told
        except (OSError, AssertionError) as error:
            return f"does not use its GPUs: {error!r:.200}"


def _at_restore(call: str, what: str) -> Scene:
    """A call of the driver goes wrong in the first attempt."""

    def scene(ground: Ground, case: Case) -> Seen:
        with fault(ground.node, call, what):
            return restoring.run(ground, case, Plan())

    return scene


def at_capture(call: str, what: str) -> Scene:
    """A call of the driver goes wrong; the source goes on."""

    def scene(ground: Ground, case: Case) -> Seen:
        return _captured(ground, case, call, what, _is_over)

    return scene


def source_ends(call: str, what: str) -> Scene:
    """The same where the source is killed: kubelet starts it again, and that one is captured."""

    def ended(ground: Ground, pod: Pod) -> None:
        del ground
        pod.container().wait_exit(ENDS_WITHIN_S)
        pod.container().restart()
        first_answer(pod)

    def scene(ground: Ground, case: Case) -> Seen:
        return _captured(ground, case, call, what, ended)

    return scene


def _is_over(ground: Ground, pod: Pod) -> None:
    ground.wait(lambda: capturing.over(ground, pod), "nothing happens", ENDS_WITHIN_S)


def _captured(
    ground: Ground, case: Case, call: str, what: str, ends: Callable[[Ground, Pod], None]
) -> Seen:
    ground.restart_daemon(capture_s=2 * CAPTURE_S)
    before = capturing.published(ground)
    pod = capturing.source(ground, case, capture_when="signal")
    nonce = first_answer(pod)["nonce"]
    with fault(ground.node, call, what):
        ask(pod, "/ready")
        ends(ground, pod)
    now = first_answer(pod)["nonce"]
    if now != nonce:
        ask(pod, "/ready")
    time.sleep(0.1)
    return capturing.recovered(ground, pod, now, before)


SCENES: Final[dict[tuple[str, str], Scene]] = {
    ("restore: CUDA driver", "out of memory"): _at_restore("restore.once", "stuck 2"),
    ("restore: CUDA driver", "refuses the devices"): _at_restore("restore.once", "error 1"),
    ("restore: CUDA driver", "does not unlock"): _at_restore("unlock.once", "error 999"),
    ("restore: CUDA driver", "hangs"): _at_restore("restore", "hang"),
    ("restore: CUDA driver", "a process dies in it"): _at_restore("restore.once", "kill"),
    ("restore: CUDA driver", "its helper dies"): _at_restore("restore.once", "die"),
    ("capture: CUDA driver", "the lock fails"): at_capture("lock.once", "error 999"),
    ("capture: CUDA driver", "the lock hangs"): at_capture("lock", "hang"),
    ("capture: CUDA driver", "the checkpoint fails"): at_capture("checkpoint.once", "error 2"),
    ("capture: CUDA driver", "the checkpoint hangs"): at_capture("checkpoint", "hang"),
    ("capture: CUDA driver", "its helper dies"): at_capture("checkpoint.once", "die"),
    ("capture: CUDA driver", "does not give the source back"): source_ends(
        "restore.once", "stuck 2"
    ),
    ("capture: CUDA driver", "the source dies in it"): source_ends("checkpoint", "kill"),
}  # fmt: skip
