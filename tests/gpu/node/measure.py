"""The measurements on a node: captures, restores, cold starts; what each found, as JSON."""

from __future__ import annotations

import ast
import contextlib
import http.client
import json
import os
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, Final

from tests.gpu.node.table import median_steps, spread, summary
from tests.node.gpus import in_use
from tests.node.swapping import QUICKTHAW, RUN, SNAPSHOTS, is_restored, said, wishes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.gpu.node.work import Work
    from tests.node.kubelet import Container, Pod
    from tests.node.node import Node

PORT: Final = 8000
ANSWERS_WITHIN_S: Final = 150.0
CAPTURED_WITHIN_S: Final = 300.0
IDLE_WITHIN_S: Final = 10.0
IDLE_BYTES: Final = 64 << 20
"""An idle H200 shows 4 MiB in use."""
DEADLINE_S: Final = 60


class Run:
    """One run of the measurements. until: on time.monotonic, when it must be over."""

    def __init__(self, node: Node, work: Work, out: Path, until: float) -> None:
        self.node, self.work, self.out, self.until = node, work, out, until
        self.document: dict[str, Any] = {"seconds": {}, "failed": {}, "left_out": []}
        self._began = time.monotonic()

    def part(self, name: str, needs_s: float, do: Callable[[], Any]) -> None:
        """Do a part if its time is there, and write all that is known."""
        if time.monotonic() + needs_s > self.until:
            self.document["left_out"].append(name)
        else:
            began = time.monotonic()
            try:
                self.document[name] = do()
            except Exception as error:  # noqa: BLE001 - the other parts matter as well
                told = f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-4)}"
                self.document["failed"][name] = told[-6000:]
                print(f"{name} FAILED: {told[:3000]}", flush=True)
            finally:
                with contextlib.suppress(Exception):
                    self.node.kubelet.remove_pods()
                    for snapshot in self._snapshots():  # they lie in memory
                        self.node.run([QUICKTHAW, "rm", snapshot])
            self.document["seconds"][name] = round(time.monotonic() - began, 1)
        self.write()
        at = time.monotonic() - self._began
        print(f"[{at:6.1f}] {name}: {json.dumps(self.document.get(name))[:1500]}", flush=True)

    def write(self) -> None:
        """Write what is known so far."""
        (self.out / "gpu.json").write_text(json.dumps(self.document, indent=1) + "\n")
        (self.out / "gpu.md").write_text(summary(self.document))

    # Requests

    def get(self, pod: Pod, path: str, within_s: float = ANSWERS_WITHIN_S) -> Any:
        got = self.node.http("GET", pod.ip, PORT, path, timeout_s=within_s)
        if got.status != http.client.OK:
            raise AssertionError(f"{path}: {got.status} {got.body[:300]!r}")
        return got.json()

    def begun(self, pod: Pod) -> tuple[Container, First]:
        """Start a pod's container while somebody asks it all the time."""
        pod.run_sandbox()
        container = pod.container()
        container.create()
        first = First(self, pod)
        container.start()
        return container, first

    def idle(self) -> bool:
        """Whether the devices are free soon."""
        until = time.monotonic() + IDLE_WITHIN_S
        while max(in_use(self.node).values()) > IDLE_BYTES:
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
        return True

    # Parts

    def cold(self, gib: float, times: int) -> dict[str, Any]:
        """Start from a file in the page cache."""
        self.work.weights(self.node, gib)
        found = []
        for number in range(times):
            spec = self.work.spec("cold", gib, weights=True)
            pod = self.node.kubelet.make_pod(f"cold-{number}", [spec], annotations={})
            container, first = self.begun(pod)
            found.append(first.took(container))
            pod.remove(grace_s=0)
        self.work.forget_weights(self.node)
        return {"gib": gib, "first_answer_s": spread(found), "runs": found}

    def way(self, name: str, gib: float, restores: int, *, again: bool) -> dict[str, Any]:
        """Capture, restore some times; again: capture the last one once more, and restore that."""
        spec = self.work.spec(name, gib)
        marks = wishes(capture_when="signal", gpu=name, deadline=f"{DEADLINE_S}s")
        source = self.node.kubelet.make_pod(f"{name}-source", [spec], annotations=marks)
        container, first = self.begun(source)
        took = first.took(container)
        right, whole = first.reply, self.whole(source)
        found: dict[str, Any] = {"gib": gib, "source_started_s": took}
        found |= self.captured(source, right)
        found["source_right_after"] = self.whole(source) == whole
        source.remove(grace_s=0)
        found["free_after_source"] = self.idle()
        runs = []
        for number in range(restores):
            is_last = number == restores - 1
            pod = self.node.kubelet.make_pod(f"{name}-{number}", [spec], annotations=marks)
            run = self.restored(pod, right, whole if number in (0, restores - 1) else None)
            runs.append(run)
            if is_last and again and run["restored"]:
                found["second_capture"] = self.captured(pod, right)
                pod.remove(grace_s=0)
                twice = self.node.kubelet.make_pod(f"{name}-twice", [spec], annotations=marks)
                run = self.restored(twice, right, whole)
                found["again"] = run
                found["again_first_answer_s"] = spread([run["first_answer_s"]])
                pod = twice
            pod.remove(grace_s=0)
            run["free_after"] = self.idle()
        good = [run for run in runs if run["restored"] and run["right"]]
        found["first_answer_s"] = spread(run["first_answer_s"] for run in good)
        found["restore_steps"] = median_steps([run["steps"] for run in good])
        found["right"] = f"{len(good)} of {len(runs)}"
        return found | {"runs": runs}

    def whole(self, pod: Pod) -> Any:
        path = "/checksum" if self.work.first != "/gpu" else self.work.first
        return self.work.checksum(self.get(pod, path, 300))

    def captured(self, pod: Pod, right: Any) -> dict[str, Any]:
        """Capture a pod that is asked without pause."""
        before = self._snapshots()
        with self.asked(pod, right) as asking:
            began = time.monotonic()
            self.capture(pod)
            took = time.monotonic() - began
        (made,) = self._snapshots() - before
        manifest = json.loads(self.node.path(f"{SNAPSHOTS}/{made}/manifest.json").read_text())
        return {
            "stopped_s": spread([max(asking.waits)]), "capture_s": round(took, 2),
            "answers": len(asking.waits), "wrong": asking.wrong, "errors": asking.errors[:5],
            "capture_steps": manifest["timings"], "sizes": manifest["sizes"],
            "way": json.loads(manifest["facts"]["gpu_payload"])["way"],
        }  # fmt: skip

    def capture(self, pod: Pod) -> None:
        """Have it captured: on request when it is restored, else as it says that it is ready."""
        container = pod.container()
        if is_restored(container):
            self.node.run([QUICKTHAW, "capture", pod.spec.name], timeout_s=CAPTURED_WITHIN_S)
            return
        self.node.path(f"{RUN}/control/{container.id}/ready").touch()
        said(self.node, f"({container.id[:12]}) captured as ", within_s=CAPTURED_WITHIN_S)

    def _snapshots(self) -> set[str]:
        return set(os.listdir(self.node.path(SNAPSHOTS)))

    def restored(self, pod: Pod, right: Any, whole: Any) -> dict[str, Any]:
        """Start a pod from the snapshot. whole: the checksum to compare, None for no comparison."""
        container, first = self.begun(pod)
        took = first.took(container)
        found = {
            "first_answer_s": took, "restored": is_restored(container),
            "right": self.work.is_right(first.reply, right), "start_call_s": container.start_took_s,
            "steps": self.steps(container),
        }  # fmt: skip
        if whole is not None:
            found["whole_right"] = self.whole(pod) == whole
        return found

    def steps(self, container: Container) -> dict[str, float]:
        """Of a restore, as the journal has them."""
        until = time.monotonic() + 5.0
        while time.monotonic() < until:
            for line in self.node.journal().splitlines():
                if container.id[:12] in line and "restored from" in line:
                    found: dict[str, float] = ast.literal_eval(line[line.index("{") :])
                    return found
            time.sleep(0.05)
        return {}

    @contextlib.contextmanager
    def asked(self, pod: Pod, right: Any) -> Iterator[Asking]:
        """Ask without pause inside of the `with`."""
        asking = Asking(self, pod, right if self.work.asked == self.work.first else None)
        asking.thread.start()
        try:
            yield asking
        finally:
            asking.ending.set()
            asking.thread.join()


class First:
    """Asks from before the start on. reply: the first good answer."""

    def __init__(self, run: Run, pod: Pod) -> None:
        self._run, self._pod = run, pod
        self.reply: Any = None
        self._at = 0.0
        self._error = ""
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        until = time.monotonic() + ANSWERS_WITHIN_S
        while time.monotonic() < until:
            try:
                self.reply = self._run.get(self._pod, self._run.work.first)
                self._at = time.perf_counter()
                return
            except (OSError, http.client.HTTPException, AssertionError) as error:
                self._error = f"{type(error).__name__}: {error}"
                time.sleep(0.002)

    def took(self, container: Container) -> float:
        """Seconds from the call of StartContainer. Raises AssertionError with the log."""
        self._thread.join()
        if self.reply is None:
            raise AssertionError(f"no answer: {self._error}; {container.logs()[-1500:]}")
        return round(self._at - container.start_called_s, 4)


class Asking:
    """waits: seconds of each answer. wrong: how many were."""

    def __init__(self, run: Run, pod: Pod, right: Any) -> None:
        self._run, self._pod, self._right = run, pod, right
        self.waits: list[float] = []
        self.wrong = 0
        self.errors: list[str] = []
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self.ending.is_set():
            began = time.monotonic()
            try:
                answer = self._run.get(self._pod, self._run.work.asked)
            except (OSError, http.client.HTTPException, AssertionError) as error:
                self.errors.append(f"{type(error).__name__}: {error}")
                time.sleep(0.01)
                continue
            self.waits.append(round(time.monotonic() - began, 4))
            if self._right is not None and not self._run.work.is_right(answer, self._right):
                self.wrong += 1
