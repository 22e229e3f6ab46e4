"""Runs the demo: starts pods of the inference worker, cold and restored, and compares them.

Prints nothing but the progress; see `__main__` for the table.
"""

import ast
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

from tests.demo import asking, overhead
from tests.demo.figures import Spread
from tests.demo.overhead import Overhead
from tests.node import source
from tests.node.kubelet import Container, Pod
from tests.node.node import Node
from tests.node.podspec import ContainerSpec
from tests.node.swapping import QUICKTHAW, SnapshotRef, is_restored, published, said, wishes
from tests.workers import images
from tests.workers.inputs import Input

if TYPE_CHECKING:
    from tests.demo.asking import Answers

TURNS: Final = ("restore", "cold", "restore", "restore", "cold", "restore", "restore", "cold")
"""Restored and cold pods by turns: other load on this machine meets both."""

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Run:
    """A pod's start and its answers. kind: `first` (annotated and cold), `cold`, `restore`.

    differences: the failed checks, empty when all is well. steps: seconds by step of the swap.
    """

    pod: str
    kind: str
    first_answer_s: float
    start_container_s: float
    answers_equal: bool
    init_is_restored: bool
    differences: Sequence[str]
    steps: dict[str, float]


@dataclass
class Found:
    """Everything that the demo measures and checks."""

    runs: list[Run] = field(default_factory=list)
    overheads: list[Overhead] = field(default_factory=list)
    source_serves: bool = False
    frozen_s: float = 0.0
    snapshot: dict[str, Any] = field(default_factory=dict)

    def seconds(self, kind: str) -> Spread:
        """Returns the seconds from StartContainer to the first answer, over the runs of a kind."""
        return Spread.of(run.first_answer_s for run in self.runs if run.kind == kind)

    @property
    def speedup(self) -> float:
        """Returns the ratio of the medians."""
        return self.seconds("cold").median / self.seconds("restore").median

    @property
    def overhead_ms(self) -> float:
        """Returns the milliseconds added to the slower of the measured calls."""
        return max(each.added_ms.median for each in self.overheads)

    @property
    def answers_equal(self) -> bool:
        """Whether every pod's answers, and the source's at the end, equal the source's first."""
        return self.source_serves and all(run.answers_equal for run in self.runs)

    @property
    def init_is_restored(self) -> bool:
        """Whether exactly the pods that were to be restored are restored."""
        return all(run.init_is_restored == (run.kind == "restore") for run in self.runs)

    @property
    def differences(self) -> list[str]:
        """Returns all failed checks, for people."""
        return [f"{run.pod}: {what}" for run in self.runs for what in run.differences]

    def as_json(self) -> dict[str, object]:
        """Returns the findings for demo.json."""
        return {
            "cold_s": self.seconds("cold").median,
            "capture_frozen_s": self.frozen_s,
            "restore_s": self.seconds("restore").median,
            "speedup": round(self.speedup, 2),
            "answers_equal": self.answers_equal,
            "init_is_restored": self.init_is_restored,
            "shim_overhead_ms": self.overhead_ms,
            "differences": self.differences,
            "spread": {kind: asdict(self.seconds(kind)) for kind in ("first", "cold", "restore")},
            "overhead": [each.as_json() for each in self.overheads],
            "snapshot": self.snapshot,
            "runs": [asdict(run) for run in self.runs],
        }


class Story:
    """The demo on a node that has the package, containerd, the daemon and the image."""

    def __init__(self, node: Node, inputs: Sequence[Input], tell: Tell) -> None:
        self.node, self.inputs, self.tell = node, inputs, tell
        self.found = Found()
        self.expected: Answers = {}
        self.captured: dict[str, Any] = {}

    def run(self) -> Found:
        """Run the demo from the first pod to the last. Raises AssertionError, OSError."""
        with self._pod("first", annotated=True) as first:
            self._first(first)
            snapshot = SnapshotRef(self.node, published(first), first, "", 0.0)
            self._captured(snapshot)
            for number, kind in enumerate(TURNS, 1):
                with self._pod(f"{kind}-{number}", annotated=kind == "restore") as pod:
                    self._next(pod, kind)
                    if number == len(TURNS):
                        self.tell(
                            "Measuring the time that quickthaw-runc adds to calls without a ticket…"
                        )
                        self.found.overheads = overhead.measure(pod.container())
            self.found.source_serves = self._source_serves(first)
            self._captured_again(first)
        return self.found

    def _pod(self, name: str, *, annotated: bool) -> Pod:
        worker = ContainerSpec(images.reference("inference"))
        annotations = wishes() if annotated else {}
        return self.node.kubelet.make_pod(name, [worker], annotations=annotations)

    def _start(self, pod: Pod) -> asking.Started:
        pod.run_sandbox()
        pod.container().create()
        return asking.start(pod.container(), self.inputs[0].document)

    def _first(self, pod: Pod) -> None:
        started = self._start(pod)
        self.tell(
            f"Pod [b]first[/b] started cold: first answer after {started.first_answer_s:.2f} s"
        )
        self.expected = asking.answers(pod, self.inputs)
        wrong = [i.name for i in self.inputs if not i.is_answered_by(self.expected[i.name])]
        self._note(pod, "first", started, [f"wrong answer for {name}" for name in wrong])

    def _captured(self, snapshot: SnapshotRef) -> None:
        manifest = snapshot.manifest()
        self.captured = asking.state(snapshot.source)
        self.found.frozen_s = manifest["timings"]["frozen"]
        parts = ("id", "sizes", "timings", "software")
        self.found.snapshot = {part: manifest[part] for part in parts}
        size_mib = sum(manifest["sizes"].values()) >> 20
        self.tell(
            f"Pod captured when ready: {size_mib} MiB, frozen for {self.found.frozen_s:.2f} s"
        )
        if not self._source_serves(snapshot.source):
            raise AssertionError("the captured pod does not serve as before")
        self.tell(f"The pod goes on serving: the same {len(self.inputs)} answers, the same process")

    def _captured_again(self, pod: Pod) -> None:
        """Compare the source before and after another capture. Raises AssertionError."""
        before = source.settled(pod.container())
        self.node.run([QUICKTHAW, "capture", pod.spec.name])
        source.assert_unharmed(pod.container(), before)
        self.tell("Captured once more, it has the memory, descriptors and areas that it had")

    def _source_serves(self, pod: Pod) -> bool:
        now = asking.state(pod)
        return (
            now["nonce"] == self.captured["nonce"]
            and all(now["kept"].values())
            and asking.answers(pod, self.inputs) == self.expected
        )

    def _next(self, pod: Pod, kind: str) -> None:
        started = self._start(pod)
        self.tell(
            f"Pod [b]{pod.spec.name}[/b] {'restored' if is_restored(pod.container()) else 'cold'}: "
            f"first answer after {started.first_answer_s:.2f} s"
        )
        wrong = [] if kind == "cold" else self._unlike_the_captured(pod)
        self._note(pod, kind, started, wrong)

    def _note(self, pod: Pod, kind: str, started: asking.Started, wrong: list[str]) -> None:
        container = pod.container()
        equal = asking.answers(pod, self.inputs) == self.expected
        if not equal:
            wrong = [*wrong, "the answers differ from the first pod's"]
        restored = is_restored(container) and asking.state(pod)["nonce"] == self.captured["nonce"]
        self.found.runs.append(
            Run(
                pod.spec.name, kind, round(started.first_answer_s, 4),
                round(started.returned_s, 4), equal, restored, wrong,
                self._steps(container) if restored else {},
            )
        )  # fmt: skip

    def _unlike_the_captured(self, pod: Pod) -> list[str]:
        """Returns the signs that this pod's process 1 is not the captured process, whole."""
        container, now = pod.container(), asking.state(pod)
        checks = {
            "the pod started cold": is_restored(container),
            "the nonce differs from the captured process's": now["nonce"] == self.captured["nonce"],
            "the process that answers is not the container's init": now["pid"] == 1,
            "CRI names another process": self._is_init(container),
            "a file or shared memory is damaged": all(now["kept"].values()),
            "the workload was not told about the restore": (now["restored"] or {}).get("pod")
            == pod.spec.name,
            "the hostname is another pod's": now["hostname"] == pod.spec.name,
        }
        return [what for what, well in checks.items() if not well]

    def _is_init(self, container: Container) -> bool:
        """Whether CRI's pid is process 1 of its PID namespace, in this container's cgroup."""
        process = f"/proc/{container.host_pid}"
        with open(f"{process}/status") as status, open(f"{process}/cgroup") as cgroup:
            numbers = next(line for line in status if line.startswith("NSpid:")).split()
            return numbers[-1] == "1" and container.id in cgroup.read()

    def _steps(self, container: Container) -> dict[str, float]:
        """Returns the steps of the swap, from the daemon's journal."""
        line = said(self.node, f"({container.id[:12]}) restored from ")
        steps: dict[str, float] = ast.literal_eval(line[line.index("{") :])
        return steps


def machine(node: Node) -> dict[str, str]:
    """Returns facts of the machine on which the figures were measured."""
    versions = {
        "containerd": ["containerd", "--version"],
        "runc": ["runc", "--version"],
        "criu": ["criu", "--version"],
        "kernel": ["uname", "-sr"],
        "cores": ["nproc"],
        "memory": ["sh", "-c", "awk '/MemTotal/ {printf \"%d GiB\", $2 / 1048576}' /proc/meminfo"],
    }
    printed = {name: node.run(command).splitlines()[0] for name, command in versions.items()}
    return {name: _version(text) for name, text in printed.items()} | {
        "at": time.strftime("%Y-%m-%d", time.gmtime())
    }


def _version(text: str) -> str:
    """Returns a version without words that say nothing, such as `runc version`."""
    words = text.split()
    if words[:1] == ["containerd"]:
        return words[2]
    return text.removeprefix("runc version ").removeprefix("Version: ")
