"""A test node as the tests use it: containerd, the installed product, and a kubelet."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.node.containerd import Containerd
from tests.node.cri import Cri
from tests.node.enclosure import Enclosure
from tests.node.images import import_image
from tests.node.inventory import Inventory, take
from tests.node.kubelet import Kubelet
from tests.node.units import Service, apply_tmpfiles, read_unit

DAEMON_UNIT: Final = "/usr/lib/systemd/system/quickthawd.service"
DAEMON_TMPFILES: Final = "/usr/lib/tmpfiles.d/quickthaw.conf"
CONNECTS_WITHIN_S: Final = 20.0


class Node(Enclosure):
    """A node: `with Node("forky") as node`. Nothing runs on the node at first.

    The order of a real node's life: `install_deb`, `start_containerd`, `start_daemon`, pods.
    """

    def __init__(self, suite: str, **more: Any) -> None:
        """more: keyword arguments of Enclosure."""
        super().__init__(suite, **more)
        self.containerd = Containerd(self)
        self.kubelet = Kubelet(self)
        self._daemon: Service | None = None

    def __exit__(self, *_: object) -> None:
        self.kill_daemon()
        self.containerd.kill()
        super().__exit__()

    @property
    def cri(self) -> Cri:
        """Returns the CRI client of the running containerd."""
        return self.containerd.cri

    def install_deb(self, deb: Path) -> str:
        """Install our package with dpkg; returns the output of dpkg. Raises CommandFailed.

        containerd calls quickthaw-runc from its next start on, until `containerd.swapping` is set
        to False and containerd starts again.
        """
        inside = f"/var/tmp/{deb.name}"
        self.path(inside).write_bytes(deb.read_bytes())
        wrote = self.run(["dpkg", "--install", inside], timeout_s=300)
        self.path(inside).unlink()
        self.containerd.swapping = True
        return wrote

    def start_containerd(self) -> None:
        """Start containerd with the present configuration. Raises ServiceFailed."""
        self.containerd.start()
        self.kubelet.started()

    def restart_containerd(self) -> None:
        """Stop containerd and start it again; containers run on.

        Waits until a running quickthawd has connected again: a pod that came before that would
        start cold. Raises TimeoutError with the journal.
        """
        before, waits = self._connections(), self.daemon_pid > 0
        self.containerd.restart()
        until = time.monotonic() + CONNECTS_WITHIN_S
        while waits and self._connections() <= before:
            if time.monotonic() > until:
                raise TimeoutError(f"quickthawd has not connected again:\n{self.journal()}")
            time.sleep(0.02)

    def _connections(self) -> int:
        return self.journal().count("synchronized with")

    def start_product(self, deb: Path) -> None:
        """Install our package, start containerd with it and the daemon. Raises ServiceFailed."""
        self.install_deb(deb)
        self.start_containerd()
        self.start_daemon()

    def import_image(self, archive: Path) -> None:
        """Load an image (see `images.write_image`)."""
        import_image(self, archive)

    # The daemon

    def start_daemon(self) -> None:
        """Start quickthawd as its installed unit says, and wait for READY=1.

        Raises ServiceFailed with the end of the journal.
        """
        if self._daemon is None:
            apply_tmpfiles(self, DAEMON_TMPFILES)
            self._daemon = Service(self, read_unit(self, DAEMON_UNIT))
        self._daemon.start()

    def stop_daemon(self) -> int:
        """Send SIGTERM to quickthawd; returns the exit status."""
        return self._daemon.stop() if self._daemon else 0

    def kill_daemon(self) -> int:
        """Send SIGKILL to quickthawd, and not to the processes that it started."""
        return self._daemon.kill() if self._daemon else 0

    @property
    def daemon_pid(self) -> int:
        """Returns quickthawd's pid as the host sees it, -1 while quickthawd does not run."""
        return self._daemon.pid if self._daemon else -1

    def journal(self) -> str:
        """Returns all output of quickthawd since the start of the node."""
        return self._daemon.journal() if self._daemon else ""

    @contextmanager
    def daemon_stopped(self) -> Iterator[None]:
        """Stops quickthawd inside of the `with`."""
        self.stop_daemon()
        try:
            yield
        finally:
            self.start_daemon()

    def inventory(self) -> Inventory:
        """Returns the present objects that a test could leave behind."""
        return take(self)
