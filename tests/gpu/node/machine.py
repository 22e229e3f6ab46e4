"""A node that is this machine itself: no namespaces of its own, no chroot."""

from __future__ import annotations

import os
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from tests.node import cgroups
from tests.node.containerd import Containerd
from tests.node.enclosure import ENVIRONMENT
from tests.node.kubelet import Kubelet
from tests.node.node import Node

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

KEPT: Final = ("LD_LIBRARY_PATH",)
"""How a machine may say where its driver's libraries are."""


class Machine(Node):
    """This machine. directory: for what a node keeps."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.suite = "machine"
        self.pid = 1
        self._directory = directory
        self.cgroups = [each.mount_point for each in cgroups.hierarchies()]
        self.homes = []
        self._undo = ExitStack()
        self.containerd = Containerd(self)
        self.kubelet = Kubelet(self)
        self._daemon = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_daemon()
        self.containerd.kill()

    @property
    def name(self) -> str:
        return "machine"

    def path(self, inside: str) -> Path:
        """The same."""
        return Path("/") / inside.lstrip("/")

    def host_pid(self, pid: int) -> int:
        """The same."""
        return pid

    def popen(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        report_fd: int | None = None,
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """Start a program."""
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        process = subprocess.Popen(
            list(argv), env={**ENVIRONMENT, **kept, **(environment or {})}, start_new_session=True,
            **options,
        )  # fmt: skip
        if report_fd is not None:
            os.write(report_fd, f"{process.pid}\n".encode())
        return process

    def _socket(self, family: socket.AddressFamily) -> socket.socket:
        return socket.socket(family, socket.SOCK_STREAM)
