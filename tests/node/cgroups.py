"""A cgroup per hierarchy for a test node, beneath the cgroup of the test run.

The node's init starts in these cgroups and in a cgroup namespace whose root they are, so that the
node makes everything beneath them, and removing them removes everything. Handles version 1, the
hybrid of both, and version 2 alone.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shim.kernel import procfs

NAME_PREFIX = "quickthaw-test-"


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """A mounted cgroup hierarchy of the host. `options` are the options that mount(2) needs."""

    version: int
    options: str
    mount_point: Path
    own: Path
    """The cgroup of this process, as a directory beneath `mount_point`."""


def hierarchies() -> list[Hierarchy]:
    """Returns the hierarchies that /proc/self/cgroup names and /proc/self/mountinfo shows."""
    found = []
    for controllers, path in procfs.cgroups("self"):
        version = 1 if controllers else 2
        mounted = _mounted(version, controllers)
        if mounted is None:
            continue
        mount_point, root = mounted
        own = mount_point / os.path.relpath(path, root)
        found.append(Hierarchy(version, _options(controllers), mount_point, own))
    return found


def _options(controllers: str) -> str:
    return f"none,{controllers}" if controllers.startswith("name=") else controllers


def _mounted(version: int, controllers: str) -> tuple[Path, str] | None:
    """Returns mount point and root of a hierarchy. Format: proc_pid_mountinfo(5)."""
    wanted = set(controllers.split(","))
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, after = line.split(" - ", 1)
        kind, _, super_options = after.split(" ", 2)
        root, mount_point = before.split(" ")[3:5]
        if kind == "cgroup2" and version == 2:
            return Path(mount_point), root
        if kind == "cgroup" and version == 1 and wanted <= set(super_options.split(",")):
            return Path(mount_point), root
    return None


def make(identity: str) -> list[Path]:
    """Makes the cgroups of node `identity`, one per hierarchy, ready to have processes in them."""
    made = []
    for hierarchy in hierarchies():
        path = _place(hierarchy) / f"{NAME_PREFIX}{identity}"
        path.mkdir(exist_ok=True)
        inherit_cpuset(path)
        made.append(path)
    return made


def home(path: Path) -> Path:
    """Returns the cgroup of a node's own processes within the node's cgroup `path`.

    With version 2 not `path` itself: `path` would then have no controllers for containers.
    """
    return path if (path / "tasks").exists() else path / "system"


def inherit_cpuset(path: Path) -> None:
    """Fill a new cpuset of version 1: a new cpuset is empty, and nothing may run in an empty
    cpuset.
    """
    for name in ("cpuset.cpus", "cpuset.mems"):
        if (path / name).exists() and (path / "cgroup.clone_children").exists():
            (path / name).write_text((path.parent / name).read_text())


def _place(hierarchy: Hierarchy) -> Path:
    # Version 2 lets no cgroup have both processes and controllers for its children, except the
    # root: beneath our own cgroup, which has the test run in it, the node would get none.
    alone = hierarchy.version == 2 and hierarchy.mount_point == Path("/sys/fs/cgroup")
    return hierarchy.mount_point if alone else hierarchy.own


def of_node(identity: str) -> list[Path]:
    """Returns the cgroups of node `identity` that exist."""
    paths = [_place(each) / f"{NAME_PREFIX}{identity}" for each in hierarchies()]
    return [path for path in paths if path.is_dir()]


def remove(path: Path) -> None:
    """Remove a cgroup and its descendants. No process may run in them any more (OSError: EBUSY)."""
    for directory, _, _ in os.walk(path, topdown=False):
        with contextlib.suppress(FileNotFoundError):
            Path(directory).rmdir()


def below(path: Path) -> Iterator[Path]:
    """Yields every cgroup beneath `path`."""
    for directory, _, _ in os.walk(path):
        if Path(directory) != path:
            yield Path(directory)


def processes(named: str) -> list[int]:
    """Returns processes in cgroups of nodes whose name has `named`, also processes that are dying.

    Read from /proc: cgroup.procs leaves dying processes out, and they still hold mounts. Leaves out
    zombies that wait for their parent.
    """
    found = []
    for pid in procfs.pids():
        try:
            paths = "\n".join(path for _, path in procfs.cgroups(pid))
            alive = procfs.state(pid) != "Z"
        except (FileNotFoundError, ProcessLookupError):
            continue
        if alive and NAME_PREFIX in paths and named in paths:
            found.append(pid)
    return sorted(found)
