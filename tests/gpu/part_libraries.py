"""Question 6: what of CUDA's libraries and PyTorch survives, bit for bit."""

from collections.abc import Callable
from functools import partial
from typing import Any

from tests.gpu.children import Helper, Worker
from tests.gpu.images import temporary
from tests.gpu.procfs import Look
from tests.gpu.scene import Scene, walked

SMALL = "256x2"


def features(scene: Scene, helper: Helper, *names: str, **variables: str) -> dict[str, Any]:
    """In place first, then through CRIU as well."""
    with scene.torch(SMALL, *names, timeout_s=120, **variables) as worker:
        found: dict[str, Any] = {"made": worker.ready, "check before": worker.check()}
        steps, looks = walked(helper, worker)
        found["resident MiB"] = looks["start"].totals()
        found["ms"] = {step: each["ms"] for step, each in steps.items()}
        found["states"] = {step: (each["name"], each["state"]) for step, each in steps.items()}
        found["open when checkpointed"] = left_open(looks)
        found["grown"] = steps.get("checkpoint", {}).get("changed", {}).get("grown")
        found["check in place"] = worker.check()
        found["through CRIU"] = through_criu(scene, helper, worker)
        return found


def left_open(looks: dict[str, Look]) -> dict[str, Any]:
    """Of the GPU's files."""
    return looks["checkpoint"].devices() if "checkpoint" in looks else {}


def through_criu(scene: Scene, helper: Helper, worker: Worker) -> dict[str, Any]:
    """Checkpoint, dump, restore, driver restore, check."""
    found: dict[str, Any] = {"frozen": helper.freeze(worker.pid)["state"]}
    with temporary(scene.scratch / "images") as images:
        found["dump"] = scene.criu.dump(worker.pid, images)
        if not found["dump"]["ok"]:
            return found
        worker.reap()
        found["restore"] = scene.criu.restore(images)
        if not found["restore"]["ok"]:
            return found
        with worker.restored(found["restore"]["pid"]) as again:
            return {**found, **helper.thaw(again.pid), "check": again.check()}


def two_processes(scene: Scene, helper: Helper) -> dict[str, Any]:
    """Two on one device: the one goes on while the other is checkpointed; then both are."""
    with scene.torch(SMALL, "cublas") as one, scene.torch(SMALL, "cublas") as two:
        found: dict[str, Any] = {"one": helper.freeze(one.pid), "the other then": two.check()}
        found["two"] = helper.freeze(two.pid)
        found["one again"] = helper.thaw(one.pid)
        found["check one"] = one.check()
        found["two again"] = helper.thaw(two.pid)
        return {**found, "check both": [one.check(), two.check()]}


def run(scene: Scene, only: tuple[str, ...]) -> None:
    """`only`: which of the steps."""
    several = ("cublas", "cudnn", "graph", "streams", "pinned")
    steps: dict[str, Callable[[Scene, Helper], dict[str, Any]]] = {
        "cuBLAS, cuDNN, graph, streams, pinned": lambda s, h: features(s, h, *several),
        "two processes": two_processes,
        "NVML": lambda s, h: features(s, h, "nvml"),
        "torch.compile, no compile workers": lambda s, h: features(
            s, h, "compiled", TORCHINDUCTOR_COMPILE_THREADS="1"
        ),
        "torch.compile": lambda s, h: features(s, h, "compiled"),
    }
    for name, work in steps.items():
        if scene.wanted(name, only):
            scene.step(name, partial(_one, scene, work))


def _one(scene: Scene, work: Callable[[Scene, Helper], dict[str, Any]]) -> dict[str, Any]:
    with scene.helper() as helper:
        return work(scene, helper)
