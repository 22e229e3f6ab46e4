"""Cases of device memory that goes around the driver; with the stand-in for it."""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from tests.faults import capturing, restoring
from tests.faults.damage import damaged
from tests.faults.driver import GpuGround, at_capture, source_ends, two_processes
from tests.faults.dumping import store_is_full
from tests.faults.restoring import Plan, Seen
from tests.node.flipping import flip_bit
from tests.node.gpus import fault
from tests.node.swapping import RUN, ask, first_answer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Any

    from tests.faults.cases import Case
    from tests.faults.ground import Ground
    from tests.faults.processes import Scene
    from tests.node.kubelet import Pod
    from tests.node.podspec import ContainerSpec

MIB: Final = 24
DEADLINE: Final = "6s"
"""A restore starts a process more than that of other containers, on a machine that does much."""
LATE_MS: Final = 1500
LOOK_EVERY_S: Final = 0.02


class DirectGround(GpuGround):
    """One whose memory on GPUs the library moves."""

    marks: Final = {  # type: ignore[misc]
        "quickthaw.io/gpu": "direct", "quickthaw.io/deadline": DEADLINE,
    }  # fmt: skip
    mib = MIB

    @staticmethod
    def spec(case: str = "", **fields: Any) -> ContainerSpec:
        return two_processes(case or "direct", MIB, **fields)


def _loading(call: str, what: str) -> Scene:
    """A call of the loader goes wrong. Programs of containers do not see the fault."""

    def scene(ground: Ground, case: Case) -> Seen:
        with fault(ground.node, call, what):
            return restoring.run(ground, case, Plan())

    return scene


def _flip(directory: Path) -> None:
    flip_bit(directory / "memory" / "gpu0-00.data")


def _truncate(directory: Path) -> None:
    payload = directory / "memory" / "gpu0-01.data"
    os.truncate(payload, payload.stat().st_size - 4096)


def _remove(directory: Path) -> None:
    (directory / "memory" / "gpu0-02.data").unlink()


def _socket_is_gone(ground: Ground, case: Case) -> Seen:
    """The container takes the socket away while its memory is with the carrier."""
    before = capturing.published(ground)
    pod = capturing.source(ground, case, capture_when="signal")
    nonce = first_answer(pod)["nonce"]
    with fault(ground.node, "checkpoint", f"late {LATE_MS}"), _without_socket(ground, pod):
        ask(pod, "/ready")
        ground.wait(lambda: capturing.over(ground, pod), "nothing happens", 30.0)
    return capturing.recovered(ground, pod, nonce, before)


@contextmanager
def _without_socket(ground: Ground, pod: Pod) -> Iterator[None]:
    """Remove the socket as often as it appears."""
    path = ground.node.path(f"{RUN}/control/{pod.container().id}/gpu.sock")
    ending = threading.Event()

    def work() -> None:
        while not ending.is_set() and not path.exists():
            time.sleep(LOOK_EVERY_S)
        until = time.monotonic() + LATE_MS / 1000
        while not ending.is_set() and time.monotonic() < until:
            path.unlink(missing_ok=True)
            time.sleep(LOOK_EVERY_S)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


SCENES: Final[dict[tuple[str, str], Scene]] = {
    ("restore: device memory", "its loader dies"): _loading("to_device.once", "die"),
    ("restore: device memory", "its loader hangs"): _loading("to_device", "hang"),
    ("restore: device memory", "the device is full"): _loading("create", "error 2"),
    ("restore: device memory", "the device refuses a copy"): _loading("to_device.once", "error 1"),
    ("restore: device memory", "bit flipped"): damaged(_flip),
    ("restore: device memory", "truncated"): damaged(_truncate),
    ("restore: device memory", "a file removed"): damaged(_remove),
    ("capture: device memory", "its carrier dies"): source_ends("to_host.once", "die"),
    ("capture: device memory", "its carrier hangs"): at_capture("to_host", "hang"),
    ("capture: device memory", "the device refuses a copy"): at_capture("to_host.once", "error 1"),
    ("capture: device memory", "the store is full"): store_is_full,
    ("capture: device memory", "the socket of the library is gone"): _socket_is_gone,
}
