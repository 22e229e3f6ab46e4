"""Starts a worker through CRI in three ways: cold, runc's own restore, quickthaw."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from tests.bench.ground import CURRENT, HANDLER, STORE, Ground
from tests.bench.stamp import stamped
from tests.node import podspec
from tests.node.swapping import QUICKTHAW, RESTORE, SNAPSHOTS, is_restored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from tests.bench.workers import Worker
    from tests.node.kubelet import Pod

COLD, STOCK, PODMAN, QUICK = "cold", "stock", "podman", "quickthaw"
WAYS: Final = (COLD, STOCK, PODMAN, QUICK)


@dataclass(frozen=True, slots=True)
class Place:
    """A worker that is about to be started. ip: "" when only a started worker has an address.

    start: starts the worker, and returns the time of the call by time.perf_counter(). address: its
    IP, once started. restored: whether the worker came to be in the intended way.
    """

    ip: str
    cgroups: Callable[[], Sequence[Path]]
    start: Callable[[], float]
    address: Callable[[], str]
    restored: Callable[[], bool]


class Way(ABC):
    """A way to start a worker, on a node."""

    name: str

    def __init__(self, ground: Ground) -> None:
        self.ground = ground

    @abstractmethod
    def place(
        self, worker: Worker, name: str, *, alone: bool = True
    ) -> AbstractContextManager[Place]:
        """Prepare everything up to the call that starts the container; removed after the `with`.

        alone: whether no other replica of its kind is there at the time.
        """

    def stored(self) -> Path | None:
        """Returns the directory of the host that the way reads from."""
        return None

    def forget(self) -> None:  # noqa: B027  a cold start stores nothing
        """Remove the stored state."""


class _Cri(Way):
    """A way through kubelet's calls: timed from StartContainer on."""

    handler = ""
    annotations: ClassVar[Mapping[str, str]] = {}

    @contextmanager
    def place(self, worker: Worker, name: str, *, alone: bool = True) -> Iterator[Place]:
        del alone
        pod = self.ground.node.kubelet.make_pod(
            name,
            [worker.container()],
            annotations=self.annotations,
            runtime_handler=self.handler,
        )
        with pod:
            pod.run_sandbox()
            container = pod.container()
            container.create()
            cgroup = self.ground.cgroup(
                f"{podspec.cgroup_parent(pod.spec, pod.uid)}/{container.id}"
            )
            yield Place(
                pod.ip, lambda: [cgroup], container.start, lambda: pod.ip,
                lambda: self._is_meant(pod),
            )  # fmt: skip

    def _is_meant(self, pod: Pod) -> bool:
        return not is_restored(pod.container())


class Cold(_Cri):
    """A cold start, without any restore."""

    name = COLD


class Stock(_Cri):
    """runc's restore behind the same calls: see stock_runtime.sh."""

    name, handler = STOCK, HANDLER

    def stored(self) -> Path | None:
        return self.ground.store("stock")

    def _is_meant(self, pod: Pod) -> bool:
        return self.ground.node.path(f"/run/bench/restored/{pod.container().id}").exists()

    def checkpoint(self, pod: Pod) -> float:
        """Checkpoint a running container over the stored checkpoint. Returns runc's seconds."""
        self.forget()
        node, container = self.ground.node, pod.container()
        image = f"{STORE}/stock"
        self.ground.store("stock/criu").mkdir(parents=True)
        node.write(CURRENT, f"{image}\n")
        paths = ["--image-path", f"{image}/criu", "--work-path", f"{image}/work"]
        command = ["runc", "--root", "/run/containerd/runc/k8s.io", "checkpoint"]
        done = stamped(node, [*command, "--leave-running", *paths, container.id])
        self._keep("rootfs", _upperdir(pod))
        sandboxes = "/run/containerd/io.containerd.grpc.v1.cri/sandboxes"
        self._keep("shm", f"{sandboxes}/{pod.sandbox_id}/shm")
        return done.took_s

    def _keep(self, name: str, directory: str) -> None:
        """Store a directory that CRIU leaves to its caller."""
        if any(self.ground.node.path(directory).iterdir()):
            archive = f"{STORE}/stock/{name}.tar"
            self.ground.node.run(["tar", "-C", directory, "-cf", archive, "."])

    def forget(self) -> None:
        self.ground.node.run(["rm", "-rf", f"{STORE}/stock"])


def _upperdir(pod: Pod) -> str:
    """Returns the container's own layer, as a path of the node. Source: proc_pid_mountinfo(5)."""
    mounts = Path(f"/proc/{pod.node.pid}/mountinfo").read_text().splitlines()
    (line,) = (line for line in mounts if f"/{pod.container().id}/rootfs overlay" in _short(line))
    options = line.rpartition(" ")[2].split(",")
    return next(o.removeprefix("upperdir=") for o in options if o.startswith("upperdir="))


def _short(line: str) -> str:
    """Returns mount point and type of a line of mountinfo."""
    before, _, after = line.partition(" - ")
    return f"{before.split(' ')[4]} {after.split(' ')[0]}"


class Quickthaw(_Cri):
    """quickthaw's package as it is installed."""

    name = QUICK
    annotations: ClassVar[Mapping[str, str]] = RESTORE

    def stored(self) -> Path | None:
        return self.ground.node.path(SNAPSHOTS)

    def _is_meant(self, pod: Pod) -> bool:
        return is_restored(pod.container())

    def capture(self, pod: Pod) -> tuple[float, dict[str, float]]:
        """Capture a running container. Returns the command's seconds and the daemon's timings."""
        done = stamped(self.ground.node, [QUICKTHAW, "capture", pod.spec.name, "--json"])
        timings: dict[str, float] = json.loads(done.out)["timings"]
        return done.took_s, timings

    def forget(self) -> None:
        listed = [path.name for path in self.ground.node.path(SNAPSHOTS).iterdir()]
        if listed:
            self.ground.node.run([QUICKTHAW, "rm", *listed])
