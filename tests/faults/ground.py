"""The node for all cases of a run, a snapshot for them, and the check for left-overs."""

import contextlib
import http.client
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from shim.contract import manifest as manifests
from shim.contract.paths import FAULTS, LOGS
from shim.integrity.check import SnapshotCheck
from shim.kernel import procfs
from tests.node.kubelet import Container, Pod
from tests.node.node import Node
from tests.node.podspec import ContainerSpec
from tests.node.swapping import (
    OF_SNAPSHOTS,
    PER_CONTAINER,
    QUICKTHAW,
    RUN,
    SNAPSHOTS,
    SnapshotRef,
    answer,
    ask,
    captured,
    first_answer,
    probe,
    wishes,
)

QUARANTINE: Final = "/var/lib/quickthaw/quarantine"
STAGING: Final = "/var/lib/quickthaw/staging"
BUNDLES: Final = "/run/containerd/io.containerd.runtime.v2.task/k8s.io"
CONFIG: Final = "/etc/quickthaw/quickthaw.d/faults.toml"
CAPTURE_S: Final = 3
"""The time limit of a capture here, so that a hanging capture is soon over."""
PATIENT_S: Final = 30
"""The time limit of a capture that must succeed, whatever else the machine does."""
RESTORE: Final = {"quickthaw.io/restore": "auto", "quickthaw.io/deadline": "2s"}
IN_SHM: Final = "/dev/shm/of-the-snapshot"
IN_ROOTFS: Final = "/var/tmp/of-the-snapshot"
IPV6_PORT: Final = 8002
MEMORY_MIB: Final = 40
"""Memory of the captured process beside its interpreter, so that a limit can be too small."""
SERVES_WITHIN_S: Final = 5.0
GONE_WITHIN_S: Final = 10.0
CHECKED_WITHIN_S: Final = 60.0
SYNCHRONIZED_WITHIN_S: Final = 20.0
LOOK_EVERY_S: Final = 0.01


class WentWrong(Exception):
    """The system failed a requirement. The message names the failure."""


class Missed(WentWrong):
    """The process or state to disturb was over before the test saw it: nothing was tried."""


class Ground:
    """node: with the product and the probe's image. source: serves all the time. marks: annotations
    of every pod.
    """

    marks: ClassVar[dict[str, str]] = {}

    def __init__(self, node: Node) -> None:
        self.node = node
        self.disarm()
        self.restart_daemon(capture_s=PATIENT_S)
        self.before_source = node.inventory()
        wanted = wishes(capture_when="signal") | self.marks
        self.snapshot: SnapshotRef = captured(
            node, self.spec(), annotations=wanted, before=self._made_ready
        )
        self.source = self.snapshot.source
        # A host directory: a copy back follows each damage to the snapshot.
        self._pristine = node.kept(f"pristine-{self.snapshot.id}")
        shutil.copytree(self.snapshot.directory, self._pristine, symlinks=True)
        self.before = node.inventory()

    def close(self) -> list[str]:
        """Remove source and snapshot of the run; returns left-overs that stay nevertheless."""
        self.disarm()
        self.restart_daemon(capture_s=None)
        self.source.remove(grace_s=0)
        self.node.run([QUICKTHAW, "rm", self.snapshot.id])
        return self.left_overs(self.before_source)

    @staticmethod
    def spec(case: str = "", **fields: Any) -> ContainerSpec:
        """Returns the workload of a case, which only its own snapshot fits; without a name, the
        shared workload.
        """
        return probe(env={"CASE": case} if case else {}, **fields)

    def _made_ready(self, pod: Pod) -> None:
        """Makes state of every kind that a restore must bring along, and a cold start must not."""
        self.cold = self.facts(pod)
        ask(pod, f"/allocate?mib={MEMORY_MIB}")
        for path in (IN_SHM, IN_ROOTFS):
            ask(pod, f"/write?path={path}&size=100000&seed=1")
        ask(pod, f"/listen?host={pod.ips[1]}&port={IPV6_PORT}")
        ask(pod, "/ready")

    @staticmethod
    def facts(pod: Pod) -> dict[str, Any]:
        """Returns the files that a container finds after a cold start, whatever was tried
        before.
        """
        return {
            "mounts": ask(pod, "/mounts"),
            "restored.json": ask(pod, "/restored"),
            "/dev/shm": sorted(ask(pod, "/tree?path=/dev/shm")),
            "of the diff": answer(pod, f"/read?path={IN_ROOTFS}").status,
            "limits": ask(pod, "/who").get("limits"),
        }

    def not_right(self, pod: Pod) -> list[str]:
        """Returns the faults of a running pod, beside the checks of every ground."""
        del pod
        return []

    # Faults

    def arm(self, wanted: Sequence[dict[str, object]]) -> None:
        """Arms a fault for every program that starts from now on."""
        path = self.node.path(FAULTS)
        new = path.with_name("faults.json.new")
        new.write_text(json.dumps({"faults": list(wanted)}))
        new.chmod(0o600)
        new.rename(path)

    def disarm(self) -> None:
        """Disarms the fault for every program that starts from now on."""
        self.node.path(FAULTS).unlink(missing_ok=True)

    def restart_daemon(self, *, capture_s: int | None = CAPTURE_S) -> None:
        """Send SIGKILL to a running daemon, as systemd's watchdog would, and wait until the next
        daemon serves.

        capture_s: None for a daemon with the default configuration.
        """
        self._end_daemon()
        self.node.path(CONFIG).unlink(missing_ok=True)
        if capture_s is not None:
            self.node.write(CONFIG, f"capture_timeout_s = {capture_s}\nquarantine_after = 0\n")
        said = len(self.node.journal())
        self.node.start_daemon()
        self.wait(
            lambda: "synchronized with" in self.node.journal()[said:],
            "the daemon does not connect to containerd", SYNCHRONIZED_WITHIN_S,
        )  # fmt: skip

    def _end_daemon(self) -> None:
        deadline = time.monotonic() + SYNCHRONIZED_WITHIN_S
        while True:
            try:
                self.node.kill_daemon()
                return
            except ProcessLookupError:  # the daemon has just killed itself, and is not reaped yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(LOOK_EVERY_S)

    @property
    def daemon_dead(self) -> bool:
        """Returns whether the daemon has ended by itself."""
        try:
            return procfs.state(self.node.daemon_pid) == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    def mend_snapshot(self) -> None:
        """Put the shared snapshot back."""
        shutil.rmtree(self.snapshot.directory, ignore_errors=True)
        shutil.copytree(self._pristine, self.snapshot.directory, symlinks=True)
        for path in (self._pristine, *self._pristine.rglob("*")):
            copy = self.snapshot.directory / path.relative_to(self._pristine)
            status = path.lstat()
            os.chown(copy, status.st_uid, status.st_gid, follow_symlinks=False)
        # A damaged snapshot goes to quarantine at once, unless the daemon did not notice the
        # damage.
        if self.node.path(f"{QUARANTINE}/{self.snapshot.id}.json").exists():
            self.node.run([QUICKTHAW, "quarantine", "release", self.snapshot.id])

    def wait(self, done: Callable[[], object], what: str, within_s: float) -> None:
        """Raises WentWrong."""
        deadline = time.monotonic() + within_s
        while not done():
            if time.monotonic() > deadline:
                raise WentWrong(what)
            time.sleep(LOOK_EVERY_S)

    # Checks

    def state_of(self, pod: Pod, nonce: str) -> str:
        """Returns the state of a capture's source: `serves`, or its fault."""
        try:
            found = first_answer(pod, within_s=SERVES_WITHIN_S)["nonce"]
        except (OSError, http.client.HTTPException) as error:
            return f"does not answer: {error!r}; {freezer_state(pod.container())}"
        return "serves" if found == nonce else "was started anew"

    def not_whole(self) -> list[str]:
        """Returns damaged published snapshots, by id and reason."""
        wrong = []
        for path in self.node.path(SNAPSHOTS).iterdir():
            dirfd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            until = time.monotonic() + CHECKED_WITHIN_S
            try:
                found = manifests.read(dirfd, snapshot=path.name)
                with SnapshotCheck(
                    dirfd, found, container="-", until=until, with_marks=False
                ) as check:
                    check.begin()
                    check.finish()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is not whole
                wrong.append(f"{path.name[:12]}: {error}")
            finally:
                os.close(dirfd)
        return wrong

    def left_overs(self, before: Any = None) -> list[str]:
        """Returns left-overs, a moment after the last pod went."""
        deadline = time.monotonic() + GONE_WITHIN_S
        while (left := self._left(before or self.before)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def _left(self, before: Any) -> list[str]:
        now = self.node.inventory().less(before)
        known = [self.source.container().id] if before is self.before else []
        ours = [
            f"{RUN}/{directory}/{path.name}"
            for directory in PER_CONTAINER
            for path in self.node.path(f"{RUN}/{directory}").glob("*")
            if not any(path.name.startswith(each) for each in known)
        ]
        exist = os.listdir(self.node.path(SNAPSHOTS))
        files = [path for path in now.pop("files", ()) if not _may_stay(path, exist)]
        others = [f"{kind} {name}" for kind, names in now.items() for name in names]
        return sorted({*others, *files, *ours})

    @contextlib.contextmanager
    def daemon_log(self) -> Iterator[list[str]]:
        """Yields the daemon's journal lines of the `with`, complete after it."""
        lines: list[str] = []
        said = len(self.node.journal())
        try:
            yield lines
        finally:
            lines += self.node.journal()[said:].splitlines()


def _may_stay(path: str, snapshots: Sequence[str]) -> bool:
    """Returns the paths that may stay: a snapshot's files while the snapshot does, and logs
    longer.
    """
    if path.startswith(OF_SNAPSHOTS):
        return any(each in path for each in snapshots)
    return path.startswith((f"{LOGS}/", FAULTS))


def freezer_state(container: Container) -> str:
    """Returns `THAWED`, `FROZEN` or the reason why the state is not known."""
    try:
        rows = procfs.cgroups(container.host_pid)
    except OSError as error:
        return str(error)
    for controllers, path in rows:
        if "freezer" in controllers:
            state = Path(f"/sys/fs/cgroup/freezer{path}/freezer.state")
            return state.read_text().strip() if state.exists() else "no freezer"
    return "unknown"
