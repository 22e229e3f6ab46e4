"""Attacks on the installed product: pods that should gain nothing, and the product without a check.

The node is disposable: its installed sources are edited, and put back.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final

from shim.kernel import procfs
from tests.node.kubelet import Container, Pod
from tests.node.node import Node
from tests.node.podspec import ContainerSpec
from tests.node.swapping import SnapshotRef, captured, first_answer, probe

INSTALLED: Final = "/usr/lib/quickthaw"
SHARED: Final = "/srv/power"
"""A directory of the node that pods mount."""
SYS_ADMIN: Final = 1 << 21


@contextlib.contextmanager
def shared_directory(node: Node) -> Iterator[None]:
    """Makes SHARED, which everybody may write to, inside of the `with`."""
    node.path(SHARED).mkdir(parents=True)
    node.path(SHARED).chmod(0o777)
    yield
    node.run(["rm", "-r", SHARED])


def product_without(
    node: Node, *codes: str, of_daemon: bool = True
) -> contextlib.AbstractContextManager[None]:
    """Leaves these checks out of the installed gate inside of the `with`: an attacker's dream."""

    def taken_out(text: str) -> str:
        assert all(f'"{code}"' in text for code in codes)
        return f"{text}\nCHECKS = tuple(row for row in CHECKS if row.code not in {codes!r})\n"

    return mutant(node, "shim/gate/checks.py", taken_out, of_daemon=of_daemon)


def line_taken_out(line: str) -> Callable[[str], str]:
    """Returns an edit for `mutant`: the single line that begins like this does nothing."""

    def edit(text: str) -> str:
        found = [each for each in text.splitlines() if each.strip().startswith(line)]
        assert len(found) == 1, f"{line}: {found}"
        return text.replace(found[0], found[0].replace(line, f"pass  # {line}"))

    return edit


@contextlib.contextmanager
def mutant(
    node: Node, path: str, edit: Callable[[str], str], *, of_daemon: bool = True
) -> Iterator[None]:
    """Replaces an installed source by another inside of the `with`: for the runtime and, restarted,
    the daemon.
    """
    source = node.path(f"{INSTALLED}/{path}")
    pattern = f"__pycache__/{source.stem}.*"
    kept = {each: each.read_bytes() for each in [source, *source.parent.glob(pattern)]}
    try:
        for compiled in source.parent.glob(pattern):  # unchecked: else it runs as it is
            compiled.unlink()
        source.write_text(edit(source.read_text()))
        if of_daemon:
            restart_daemon(node)
        yield
    finally:
        for compiled in source.parent.glob(pattern):
            compiled.unlink()
        for each, content in kept.items():
            each.write_bytes(content)
        if of_daemon:
            restart_daemon(node)


def restart_daemon(node: Node) -> None:
    node.stop_daemon()
    node.start_daemon()


def status_of(container: Container) -> dict[str, str]:
    """Returns /proc/PID/status of the container's init, as the host sees it."""
    return procfs.status(container.host_pid)


def own_spec(case: str, **fields: Any) -> ContainerSpec:
    """Returns a probe that no other case's snapshot fits."""
    return probe(env={"CASE": case}, **fields)


def own_snapshot(node: Node, case: str, fields: dict[str, Any], **rest: Any) -> SnapshotRef:
    taken = captured(node, own_spec(case, **fields), **rest)
    taken.source.remove(grace_s=0)
    return taken


def start_victim(node: Node, case: str, fields: dict[str, Any], snapshot: str, **rest: Any) -> Pod:
    """Starts a pod that names the snapshot, and waits for its answer."""
    annotations = {"quickthaw.io/restore": f"sha256:{snapshot}"}
    pod = node.kubelet.run_pod(
        "victim", [own_spec(case, **fields)], annotations=annotations, **rest
    )
    first_answer(pod)
    return pod


HELPER: Final = """
import ctypes, os, socket, sys, time
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
null = os.open("/dev/null", os.O_RDWR)
for fd in (0, 1, 2):
    os.dup2(null, fd)
"""
"""Makes a process of `exec` leave the exec: it becomes a child of the container's init."""


def run_helper(container: Container, code: str) -> None:
    container.output(["python3", "-c", HELPER + code])
