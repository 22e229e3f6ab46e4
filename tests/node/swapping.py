"""Helpers for every test of the swap: pods of the probe worker, captured and restored."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shim.contract.paths import CONTAINER_WORK, CONTAINERS
from tests.node import source
from tests.node.enclosure import HttpAnswer
from tests.node.kubelet import Container, Pod
from tests.node.node import Node
from tests.node.podspec import ContainerSpec
from tests.workers import images

PROBE: Final = images.reference("probe")
PORT: Final = 8000
PREFIX: Final = "quickthaw.io/"
WHEN_HEALTHY: Final = f"http://:{PORT}/health"
RESTORE: Final = {f"{PREFIX}restore": "auto"}
"""The annotations of a pod that wants to be restored and is never captured."""
QUICKTHAW: Final = "/usr/lib/quickthaw/bin/quickthaw"
RUN: Final = "/run/quickthaw"
SNAPSHOTS: Final = "/var/lib/quickthaw/snapshots"
VERIFIED: Final = f"{RUN}/verified"
STORE: Final = "/var/lib/quickthaw"
OF_SNAPSHOTS: Final = (
    f"{SNAPSHOTS}/",
    f"{VERIFIED}/",
    f"{STORE}/quarantine/",
    f"{STORE}/health/",
    f"{STORE}/used/",
    f"{STORE}/working-sets/",
)
"""Directories whose content stays while a snapshot does."""
PER_CONTAINER: Final = ("tickets", "swapped", "containers", "control", "outcomes")
"""Directories of /run/quickthaw that are empty when no container of ours exists."""
LOOK_EVERY_S: Final = 0.02
PUBLISHED_WITHIN_S: Final = 60.0
SAID_WITHIN_S: Final = 30.0
"""Only failures wait so long. On a loaded machine, a sentence of the journal can take seconds."""
GONE_WITHIN_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class SnapshotRef:
    """A published snapshot and its source pod, which may have been removed."""

    node: Node
    id: str
    source: Pod
    nonce: str
    """A secret that only the captured process can know; empty when the workload is no probe."""
    cold_s: float
    """From StartContainer of the source to its first answer; 0 when the source is no probe."""

    @property
    def directory(self) -> Path:
        """Returns the snapshot's directory as a path of the host."""
        return self.node.path(f"{SNAPSHOTS}/{self.id}")

    def manifest(self) -> dict[str, Any]:
        """Returns the manifest in the store."""
        manifest: dict[str, Any] = json.loads((self.directory / "manifest.json").read_text())
        return manifest


def wishes(snapshot: str = "auto", capture_when: str = WHEN_HEALTHY, **more: str) -> dict[str, str]:
    """Returns the pod's annotations. An underscore in a name of `more` stands for a hyphen."""
    named = {"snapshot": snapshot, "capture-when": capture_when, **more}
    return {PREFIX + name.replace("_", "-"): value for name, value in named.items()}


def probe(**fields: Any) -> ContainerSpec:
    """Returns a container with the probe worker (tests/workers/probe.py); `fields` are
    ContainerSpec's.
    """
    return ContainerSpec(PROBE, **fields)


# Pods


def captured(
    node: Node,
    spec: ContainerSpec,
    *,
    name: str = "source",
    annotations: Mapping[str, str] | None = None,
    before: Callable[[Pod], object] | None = None,
    **rest: Any,
) -> SnapshotRef:
    """Run a pod cold and wait until its snapshot is published. Leaves the pod running, and sound.

    before: called with the running pod; with `capture-when` signal or file, `before` can make the
    container ready. rest: fields of PodSpec. Raises AssertionError with the journal.
    """
    chosen = wishes() if annotations is None else annotations
    pod = node.kubelet.run_pod(name, [spec], annotations=chosen, **rest)
    assert not is_restored(pod.container()), _told(node, f"{name} was to start cold")
    nonce, cold_s = "", 0.0
    if spec.image == PROBE:
        nonce = first_answer(pod)["nonce"]
        cold_s = time.perf_counter() - pod.container().start_called_s
    if before:
        before(pod)
    return SnapshotRef(node, published(pod), pod, nonce, cold_s)


def published(pod: Pod, container: str = "main") -> str:
    """Wait until the container is captured, and check that it is sound; returns the snapshot's id.

    Raises AssertionError.
    """
    node, short = pod.node, pod.containers[container].id[:12]
    marker = f"({short}) captured as "

    def lines() -> list[str]:
        failed = f"({short}): "
        found = [line for line in node.journal().splitlines() if short in line]
        assert not any(failed in line and "no snapshot was made" in line for line in found), _told(
            node, f"{pod.spec.name} was not captured"
        )
        return [line for line in found if marker in line]

    wait_until(lines, f"{pod.spec.name} is not captured", node, within_s=PUBLISHED_WITHIN_S)
    begins = lines()[0].partition(marker)[2].split(":")[0]
    (directory,) = node.path(SNAPSHOTS).glob(f"{begins}*")
    source.assert_sound(pod.containers[container])
    return directory.name


def restored(
    node: Node,
    spec: ContainerSpec,
    *,
    name: str = "replica",
    annotations: Mapping[str, str] | None = None,
    **rest: Any,
) -> Pod:
    """Run a pod and assert that its container `main` is restored.

    rest: fields of PodSpec. Raises AssertionError with the journal and CRIU's log.
    """
    chosen = wishes() if annotations is None else annotations
    pod = node.kubelet.run_pod(name, [spec], annotations=chosen, **rest)
    assert_restored(pod.container())
    return pod


def is_restored(container: Container) -> bool:
    """Returns whether a swap of this container, under its present id, succeeded."""
    return container.pod.node.path(f"{RUN}/swapped/{container.id}").exists()


def assert_restored(container: Container) -> None:
    """Assert that the swap happened, and that the journal says so. Raises AssertionError with the
    journal.
    """
    node, name = container.pod.node, container.pod.spec.name
    assert is_restored(container), _told(node, f"{name} was not restored")
    said(node, f"({container.id[:12]}) restored from ")


def assert_cold(container: Container) -> None:
    """Assert that the container runs, not restored. Raises AssertionError with the journal."""
    node, name = container.pod.node, container.pod.spec.name
    assert not is_restored(container), _told(node, f"{name} was restored")
    assert container.running, _told(node, f"{name} does not run")


# The probe's endpoints


def first_answer(pod: Pod, path: str = "/state", *, port: int = PORT, within_s: float = 30) -> Any:
    """Ask until there is an answer, for `within_s` seconds; returns the answer's JSON. Raises
    OSError.
    """
    return pod.node.http_get(pod.ip, port, path, retry_s=within_s).json()


def answer(pod: Pod, path: str, body: bytes = b"", *, port: int = PORT) -> HttpAnswer:
    """Send a request to the probe, whatever its answer. Raises OSError."""
    return pod.node.http("POST" if body else "GET", pod.ip, port, path, body)


def ask(pod: Pod, path: str, body: bytes = b"", *, port: int = PORT) -> Any:
    """Returns the JSON of an answer with status 200. Raises OSError, AssertionError."""
    got = answer(pod, path, body, port=port)
    assert got.status == 200, f"{path}: {got.status} {got.body.decode()}"
    return got.json()


# The journal


def said(node: Node, *parts: str, within_s: float = SAID_WITHIN_S) -> str:
    """Wait for a line of the daemon's journal with all `parts`; returns the last such line."""

    def lines() -> list[str]:
        return [line for line in node.journal().splitlines() if all(part in line for part in parts)]

    wait_until(lines, f"no line of the journal has {parts}", node, within_s=within_s)
    return lines()[-1]


def restore_log(container: Container) -> Path:
    """Returns CRIU's log of the container's restore, as a path of the host, while the container
    exists.
    """
    return container.pod.node.path(f"{CONTAINERS}/{container.id}/{CONTAINER_WORK}/restore.log")


def runtime_log(container: Container) -> Path:
    """Returns runc's log of the restore, a JSON object in each line, as `restore_log` returns
    CRIU's.
    """
    return restore_log(container).with_name("runc.log")


def lines_about(node: Node, container: Container) -> list[str]:
    """Returns the journal's lines about the container under its present id."""
    return [line for line in node.journal().splitlines() if container.id[:12] in line]


def wait_until(
    done: Callable[[], object],
    what: str,
    node: Node,
    *,
    within_s: float = SAID_WITHIN_S,
    every_s: float = LOOK_EVERY_S,
) -> None:
    """Wait until `done` gives something true. Raises AssertionError with the journal."""
    deadline = time.monotonic() + within_s
    while not done():
        assert time.monotonic() < deadline, _told(node, what)
        time.sleep(every_s)


def _told(node: Node, what: str) -> str:
    """Returns `what`, with the end of the journal and of CRIU's logs."""
    logs = f"for f in */{CONTAINER_WORK}/*.log; do echo == $f; grep -a Error $f; tail -n 5 $f; done"
    told = node.call(["sh", "-c", f"cd {RUN}/containers && {logs}"]).stdout
    return f"{what}\n{node.journal()[-4000:]}\n{told[-4000:]}"


# Objects that stay


@contextmanager
def nothing_left(node: Node) -> Iterator[None]:
    """Pods that were run inside of the `with` go at its end, and nothing of them may be left.

    Snapshots may: see `wipe_snapshots`.
    """
    before = node.inventory()
    yield
    node.kubelet.remove_pods()

    def left() -> dict[str, list[str]]:
        now = node.inventory().less(before)
        files = [path for path in now.pop("files", ()) if not path.startswith(OF_SNAPSHOTS)]
        ours = [
            f"{RUN}/{directory}/{path.name}"
            for directory in PER_CONTAINER
            for path in node.path(f"{RUN}/{directory}").glob("*")
        ]
        return {**now, "files": files + ours} if files or ours else now

    # The events of a removed container reach the daemon a moment after kubelet's call returns.
    deadline = time.monotonic() + GONE_WITHIN_S
    while (still := left()) and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY_S)
    assert still == {}, _told(node, f"this was left on the node: {still}")


def wipe_snapshots(node: Node) -> None:
    """Remove every snapshot. Restarts the daemon, which has its index in memory."""
    with node.daemon_stopped():
        node.run(["sh", "-c", f"rm -rf {SNAPSHOTS}/* {VERIFIED}/*"])
