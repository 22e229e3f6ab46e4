"""The way of podman users: export a checkpoint, and import it for each replica.

Debian's package with its defaults: crun, netavark, zstd. The call makes the container's network as
well, which kubelet has done before StartContainer: podman's user waits for both.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from tests.bench.ground import PODMAN_ENVIRONMENT, STORE
from tests.bench.stamp import stamped
from tests.bench.ways import PODMAN, Place, Way

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.bench.workers import Worker

PODMAN_IP: Final = "10.89.0.10"
PODMAN_PARENT: Final = "/libpod_parent"


class Podman(Way):
    """`podman container restore --import`: timed from the call on."""

    name = PODMAN

    def stored(self) -> Path | None:
        return self.ground.store("podman")

    def run(self, *arguments: str, timeout_s: float = 600) -> str:
        """Run podman. Returns its output. Raises CommandFailed."""
        command = ["podman", *arguments]
        return self.ground.node.run(command, timeout_s=timeout_s, environment=PODMAN_ENVIRONMENT)

    @contextmanager
    def source(self, worker: Worker) -> Iterator[str]:
        """Run a cold container. Yields its IP."""
        reference = self.ground.image(worker.image, podman=True)
        environment = [f"--env={name}={value}" for name, value in worker.env.items()]
        named = ["--name", "source", "--ip", PODMAN_IP]
        self.run("run", "--detach", *named, *environment, reference, *worker.command)
        try:
            yield PODMAN_IP
        finally:
            self._remove("source")

    def export(self) -> float:
        """Run `podman container checkpoint --export` of the source. Returns the seconds."""
        self.forget()
        self.ground.store("podman").mkdir()
        command = ["podman", "container", "checkpoint", "--export", self._export, "source"]
        return stamped(self.ground.node, command, environment=PODMAN_ENVIRONMENT).took_s

    @property
    def _export(self) -> str:
        return f"{STORE}/podman/export.tar.zst"

    @contextmanager
    def place(self, worker: Worker, name: str, *, alone: bool = True) -> Iterator[Place]:
        del worker
        addressed = [] if alone else ["--ignore-static-ip", "--ignore-static-mac"]
        command = ["podman", "container", "restore", "--import", self._export]

        def start() -> float:
            named = [*command, "--name", name, *addressed]
            return stamped(self.ground.node, named, environment=PODMAN_ENVIRONMENT).called_s

        def address() -> str:
            if alone:
                return PODMAN_IP
            networks = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
            return self.run("inspect", "--format", networks, name).strip()

        try:
            yield Place(PODMAN_IP if alone else "", self._cgroups, start, address, lambda: True)
        finally:
            self._remove(name)

    def _cgroups(self) -> list[Path]:
        parent = self.ground.cgroup(PODMAN_PARENT)
        found = parent.glob("libpod-*")
        return [path for path in found if not path.name.startswith("libpod-conmon")]

    def _remove(self, name: str) -> None:
        self.run("rm", "--force", "--time", "0", "--ignore", name)

    def forget(self) -> None:
        self.ground.node.run(["rm", "-rf", f"{STORE}/podman"])
