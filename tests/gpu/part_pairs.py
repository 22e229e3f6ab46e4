"""Question 7: GPU pair maps at a restore, and which newer calls this driver has."""

from functools import partial
from typing import Any

from tests.gpu.children import Helper
from tests.gpu.scene import Scene

SYMBOLS = (
    ("cuCheckpointProcessRestore", 12080),
    ("cuCheckpointProcessRestore", 13000),
    ("cuCheckpointOperationComplete", 13000),
    ("cuCheckpointOperationComplete", 13040),
)
OTHER = bytes(range(100, 116)).hex()


def symbols(helper: Helper) -> dict[str, Any]:
    """Custom storage is there when cuCheckpointOperationComplete is."""
    found: dict[str, Any] = {"driver": helper.started}
    for name, version in SYMBOLS:
        found[f"{name} {version}"] = helper.do("symbol", symbol=name, version=version)
    return found


def mapped(scene: Scene, helper: Helper, old: str, new: str) -> dict[str, Any]:
    """Restore with one pair; when it is refused, again with none."""
    with scene.cuda("512") as worker:
        helper.freeze(worker.pid)
        first = helper.do("restore", worker.pid, pairs=[(old, new)])
        found: dict[str, Any] = {"restore": first, "state": helper.state(worker.pid)}
        if first["code"]:
            found["restore without"] = helper.do("restore", worker.pid)
        found["unlock"] = helper.do("unlock", worker.pid)
        return {**found, "check": worker.check(20)}


def run(scene: Scene, only: tuple[str, ...]) -> None:
    """`only` has no meaning here."""
    del only
    with scene.helper() as helper:
        scene.step("symbols", partial(symbols, helper))
        own = helper.do("uuids")["uuids"][0]
    pairs = {
        "identity": (own, own),
        "unknown new": (own, OTHER),
        "unknown old": (OTHER, own),
        "both unknown": (OTHER, OTHER),
    }
    for name, (old, new) in pairs.items():
        scene.step(name, partial(_one, scene, old, new))


def _one(scene: Scene, old: str, new: str) -> dict[str, Any]:
    with scene.helper() as helper:
        return mapped(scene, helper, old, new)
