"""Access to a restored container's page server, and faults for the programs that start."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from shim.kernel import procfs
from tests.node.kubelet import Container
from tests.node.node import Node
from tests.node.swapping import RUN, wait_until


@contextlib.contextmanager
def armed(node: Node, point: str, action: str) -> Iterator[None]:
    """Arms a fault in each program that starts in the `with`."""
    path = node.path(f"{RUN}/faults.json")
    path.write_text(json.dumps({"faults": [{"point": point, "action": action}]}))
    path.chmod(0o600)
    try:
        yield
    finally:
        path.unlink()


def processes(container: Container, name: str) -> list[int]:
    """Returns our processes of that name, as the host numbers them, for a container."""
    found = []
    for path in container.pod.node.cgroups[0].rglob("cgroup.procs"):
        for pid in path.read_text().split():
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
                # A process that is ending has no command any more.
                if command and procfs.comm(pid) == name.encode():
                    assert container.id in command
                    found.append(int(pid))
    return found


def wait_filled(container: Container) -> None:
    """Wait until all memory is there. Raises AssertionError with the journal."""
    wait_until(
        lambda: not processes(container, "quickthaw-pages"), "the page server goes on",
        container.pod.node, within_s=30,
    )  # fmt: skip
