"""Faults with the driver that is there: who dies, hangs, or is damaged, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shim.contract.paths import FAULTS
from tests.gpu.node.measure import First
from tests.node.flipping import flip_bit
from tests.node.gpus import in_use
from tests.node.swapping import QUICKTHAW, RUN, SNAPSHOTS, is_restored, said, wishes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.gpu.node.measure import Run
    from tests.node.kubelet import Container, Pod

GIB: Final = 2.0
STAGING: Final = "/var/lib/quickthaw/staging"
CARRIER: Final = b"/direct/carrier.py"
HAPPENS_S: Final = 30.0
DEADLINE_S: Final = 12
HOG: Final = """
import ctypes, sys, time
lib = ctypes.CDLL("libcuda.so.1")
context, at = ctypes.c_void_p(), ctypes.c_uint64()
free, total = ctypes.c_size_t(), ctypes.c_size_t()
assert not lib.cuInit(0) and not lib.cuCtxCreate_v2(ctypes.byref(context), 0, 0)
assert not lib.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
size = ctypes.c_size_t(free.value - (int(sys.argv[1]) << 20))
print(lib.cuMemAlloc_v2(ctypes.byref(at), size), flush=True)
time.sleep(300)
"""


class Harm:
    """A snapshot, and faults around it. rows: what came of each."""

    def __init__(self, run: Run) -> None:
        self.run, self.node, self.rows = run, run.node, list[dict[str, Any]]()
        self.spec = run.work.spec("harm", GIB)
        self.marks = wishes(capture_when="signal", gpu="direct", deadline=f"{DEADLINE_S}s")
        self.right: Any = None
        self.snapshot = ""

    def all(self, cases: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        """Do every row, as long as there is time."""
        self._capture()
        for name, do in self._cases():
            if cases and name not in cases:
                continue
            if time.monotonic() + 2 * HAPPENS_S > self.run.until:
                self.rows.append({"row": name, "outcome": "left out", "ok": None, "seconds": 0})
                continue
            began = time.monotonic()
            try:
                row = do()
            except Exception as error:  # noqa: BLE001 - the others matter as well
                told = f"{type(error).__name__}: {error}"
                row = {"outcome": told.splitlines()[0][:200], "ok": False, "said": told[-2000:]}
            finally:
                self.node.kubelet.remove_pods()
            row["free_after"] = self.run.idle()
            row["ok"] = bool(row["ok"] and row["free_after"])
            self.rows.append({"row": name, **row, "seconds": round(time.monotonic() - began, 1)})
            print(json.dumps(self.rows[-1])[:400], flush=True)
            self.run.document["faults"] = self.rows
            self.run.write()
        return self.rows

    def _cases(self) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
        memory = self.node.path(f"{SNAPSHOTS}/{self.snapshot}/memory")
        return [
            ("restore: loader killed", lambda: self._cold(lambda: self._signal(signal.SIGKILL))),
            ("restore: loader stopped", lambda: self._cold(lambda: self._signal(signal.SIGSTOP))),
            ("restore: payload damaged", lambda: self._damaged(memory / "gpu0-00.data")),
            ("restore: payload missing", lambda: self._missing(memory / "gpu0-01.data")),
            ("restore: device full", self._full_device),
            ("capture: carrier killed", self._carrier_killed),
            ("capture: daemon killed, memory taken", lambda: self._daemon("capture.gpu.taken")),
            ("capture: daemon killed, checkpointed",
             lambda: self._daemon("capture.gpu.checkpointed")),
            ("capture: daemon killed, memory still away",
             lambda: self._daemon("capture.gpu.restored")),
            ("capture: store full", self._full_store),
            ("capture: library's socket gone", self._no_socket),
        ]  # fmt: skip

    def _begin(self, case: str) -> tuple[Pod, Container, First]:
        """case: of its own for what is to be captured, as it must fit no snapshot that is there."""
        spec = self.run.work.spec(case, GIB)
        pod = self.node.kubelet.make_pod("harmed", [spec], annotations=self.marks)
        container, first = self.run.begun(pod)
        first.took(container)
        return pod, container, first

    def _capture(self) -> None:
        pod, _, first = self._begin("harm")
        self.right = first.reply
        before = set(os.listdir(self.node.path(SNAPSHOTS)))
        self.run.capture(pod)
        (self.snapshot,) = set(os.listdir(self.node.path(SNAPSHOTS))) - before
        pod.remove(grace_s=0)

    # Restores

    def _cold(self, disturb: Callable[[], object]) -> dict[str, Any]:
        """A pod that starts cold in the same call, because somebody disturbs its restore."""
        pod = self.node.kubelet.make_pod("harmed", [self.spec], annotations=self.marks)
        pod.run_sandbox()
        container = pod.container()
        container.create()
        first = First(self.run, pod)
        thread = threading.Thread(target=disturb)
        thread.start()
        container.start()
        thread.join()
        took = first.took(container)
        cold = not is_restored(container)
        line = ""
        if cold:
            line = said(self.node, f"({container.id[:12]})", "starts cold", within_s=5)
        return {
            "outcome": "cold in the same call" if cold else "restored", "first_answer_s": took,
            "ok": cold and self._is_like(first.reply), "said": line[-300:],
        }  # fmt: skip

    def _is_like(self, reply: Any) -> bool:
        """Another start of the same program: the probe's content depends on its nonce."""
        if "wrong" in reply:
            return bool(reply["wrong"] == 0)
        return self.run.work.is_right(reply, self.right)

    def _signal(self, number: int) -> bool:
        """To the carrier that appears first."""
        until = time.monotonic() + HAPPENS_S
        while time.monotonic() < until:
            for pid in self._carriers():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                    return True
            time.sleep(0.005)
        return False

    def _carriers(self) -> list[int]:
        found = []
        ours = os.readlink(f"/proc/{self.node.pid}/ns/pid")
        for entry in os.listdir("/proc"):
            if entry.isdecimal():
                with contextlib.suppress(OSError):
                    argv = Path(f"/proc/{entry}/cmdline").read_bytes()
                    if CARRIER in argv and os.readlink(f"/proc/{entry}/ns/pid") == ours:
                        found.append(int(entry))
        return found

    def _damaged(self, path: Path) -> dict[str, Any]:
        flip_bit(path)
        try:
            row = self._cold(lambda: None)
        finally:
            flip_bit(path)
            with contextlib.suppress(Exception):
                self.node.run([QUICKTHAW, "quarantine", "release", self.snapshot])
        return row

    def _missing(self, path: Path) -> dict[str, Any]:
        away = path.parent.with_name("away")
        status = path.parent.stat()
        path.rename(away)
        try:
            row = self._cold(lambda: None)
        finally:
            away.rename(path)
            os.utime(path.parent, ns=(status.st_atime_ns, status.st_mtime_ns))
            with contextlib.suppress(Exception):
                self.node.run([QUICKTHAW, "quarantine", "release", self.snapshot])
        return row

    def _full_device(self) -> dict[str, Any]:
        """The device has room for a context, and not for the weights, until the restore fails."""
        if self.run.work.first == "/gpu":
            (home := self.node.path("/run/cuda-standin/faults/create")).write_text("error 2\n")
            try:
                return self._cold(lambda: None)
            finally:
                home.unlink()
        with self.node.popen(["/usr/bin/python3", "-c", HOG, "1500"], stdout=-1, text=True) as hog:
            assert hog.stdout
            hog.stdout.readline()

            def free() -> None:
                until = time.monotonic() + HAPPENS_S
                while time.monotonic() < until and not self._said_cold():
                    time.sleep(0.05)
                hog.kill()

            before = len(self.node.journal())
            self._said_cold = lambda: "was not loaded" in self.node.journal()[before:]
            return self._cold(free)

    _said_cold: Callable[[], bool] = staticmethod(lambda: False)

    # Captures

    @contextlib.contextmanager
    def _captured(self, case: str) -> Iterator[tuple[Pod, First]]:
        """A pod whose capture begins inside of the `with`."""
        pod, container, first = self._begin(case)
        self.node.path(f"{RUN}/control/{container.id}/ready").touch()
        yield pod, first

    def _goes_on(self, pod: Pod, first: First) -> bool:
        return self.run.work.is_right(self.run.get(pod, self.run.work.first), first.reply)

    def _carrier_killed(self) -> dict[str, Any]:
        """While memory is away: the container is killed, and told."""
        pod, container, _ = self._begin("carrier killed")
        thread = threading.Thread(target=self._kill_when_saving)
        thread.start()
        self.node.path(f"{RUN}/control/{container.id}/ready").touch()
        thread.join()
        line = said(self.node, container.id[:12], "did not give the source back",
                    within_s=HAPPENS_S)  # fmt: skip
        pod.container().wait_exit(HAPPENS_S)
        return {"outcome": "the source is killed and told", "ok": True, "said": line[-300:]}

    def _kill_when_saving(self) -> None:
        until = time.monotonic() + HAPPENS_S
        staging = self.node.path(STAGING)
        while time.monotonic() < until:
            if any(staging.glob("*/gpu/gpu0-00.data")):
                for pid in self._carriers():
                    os.kill(pid, signal.SIGKILL)
                return
            time.sleep(0.001)

    def _daemon(self, point: str) -> dict[str, Any]:
        """It is killed at a point: carrier and helpers give all back; the next one captures."""
        path = self.node.path(FAULTS)
        path.write_text(json.dumps({"faults": [{"point": point, "action": "kill"}]}))
        path.chmod(0o600)
        self.node.stop_daemon()
        self.node.start_daemon()
        dead = self.node.daemon_pid
        try:
            with self._captured(point) as (pod, first):
                until = time.monotonic() + HAPPENS_S
                while _runs(dead) and time.monotonic() < until:
                    time.sleep(0.02)
                began = time.monotonic()
                alone = self._goes_on(pod, first)
                took = time.monotonic() - began
        finally:
            path.unlink()
            self.node.kill_daemon()
            self.node.start_daemon()
        said(self.node, f"({pod.container().id[:12]}) captured as ", within_s=2 * HAPPENS_S)
        return {"outcome": f"goes on without a daemon after {took:.2f} s, is captured by the next",
                "ok": alone and self._goes_on(pod, first)}  # fmt: skip

    def _full_store(self) -> dict[str, Any]:
        self.node.run(
            ["mount", "-t", "tmpfs", "-o", f"size={self.run.work.little}", "tmpfs", STAGING]
        )
        try:
            with self._captured("store full") as (pod, first):
                line = said(self.node, pod.container().id[:12], "no snapshot was made",
                            within_s=2 * HAPPENS_S)  # fmt: skip
        finally:
            self.node.run(["umount", "--lazy", STAGING])
        return {"outcome": "no snapshot, the source goes on", "ok": self._goes_on(pod, first),
                "said": line[-300:]}  # fmt: skip

    def _no_socket(self) -> dict[str, Any]:
        ending = threading.Event()
        with self._captured("socket gone") as (pod, first):
            path = self.node.path(f"{RUN}/control/{pod.container().id}/gpu.sock")

            def remove() -> None:
                until = time.monotonic() + 1.0
                while not ending.is_set() and time.monotonic() < until:
                    path.unlink(missing_ok=True)
                    time.sleep(0.01)

            thread = threading.Thread(target=remove)
            thread.start()
            said(self.node, pod.container().id[:12], "captured as ", within_s=2 * HAPPENS_S)
            ending.set()
            thread.join()
        return {"outcome": "captured", "ok": self._goes_on(pod, first),
                "in_use": in_use(self.node)}  # fmt: skip


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
