"""Measures the time that quickthaw-runc adds to a runtime call of a container without a ticket."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from tests.demo.figures import Spread
from tests.node.kubelet import Container

FRONT: Final = "/usr/lib/quickthaw/bin/quickthaw-runc"
RUNTIME_ROOT: Final = "/run/containerd/runc/k8s.io"
PAIRS: Final = 200
SCRIPT: Final = "/tmp/pairs.py"


@dataclass(frozen=True, slots=True)
class Overhead:
    """Milliseconds of a kind of call, through the front and without it."""

    call: str
    front_ms: Spread
    plain_ms: Spread
    added_ms: Spread
    """Of the differences within the pairs."""

    def as_json(self) -> dict[str, object]:
        """Returns the overhead for demo.json."""
        return asdict(self)


def measure(container: Container) -> list[Overhead]:
    """Measure calls of a running container without a ticket: front and runtime by turns."""
    node = container.pod.node
    plain = node.path("/etc/quickthaw/runtime").read_text().strip()
    node.write(SCRIPT, (Path(__file__).parent / "pairs.py").read_text())
    calls = {"state": ["--root", RUNTIME_ROOT, "state", container.id], "version": ["--version"]}
    found = []
    for name, arguments in calls.items():
        commands = [json.dumps([program, *arguments]) for program in (FRONT, plain)]
        printed = node.run(["python3", "-IS", SCRIPT, str(PAIRS), *commands], timeout_s=120)
        front, without = json.loads(printed)
        added = [one - other for one, other in zip(front, without, strict=True)]
        found.append(Overhead(name, Spread.of(front), Spread.of(without), Spread.of(added)))
    node.path(SCRIPT).unlink()
    return found
