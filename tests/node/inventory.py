"""The objects on a node, and on the host because of the node, to compare before and after.

A difference is an object that a test, and therefore the product, has left behind.
"""

import json
import os
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from shim.kernel import procfs
from tests.node import cgroups
from tests.node.enclosure import ENTER, Enclosure
from tests.node.runs import RUNS, of_process

WATCHED: Final = (
    "/run/quickthaw",
    "/run/netns",
    "/run/cni/networks",
    "/run/containerd/io.containerd.runtime.v2.task",
    "/run/runc",
    "/var/lib/kubelet/pods",
    "/var/lib/quickthaw",
    "/var/log/pods",
    "/dev/shm",
    "/dev/mqueue",
    "/tmp",
    "/var/tmp",
)
"""Directories whose names a comparison reads. Not all of /: containerd keeps its own books there.
"""
KEPT_LINKS: Final = ("cni0",)
"""The first pod makes the bridge, and the bridge stays."""
KEPT_FILES: Final = (
    "/run/cni/networks/pods",
    "/run/cni/networks/pods/last_reserved_ip.0",  # host-local: the last address that it gave
    "/run/cni/networks/pods/last_reserved_ip.1",
    "/run/cni/networks/pods/lock",
    "/run/containerd/io.containerd.runtime.v2.task/k8s.io",
)
"""Objects that containerd and CNI make with the first pod and keep."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """Names of objects, each a sorted tuple, so that a failed `==` reads well."""

    processes: tuple[str, ...]
    mounts: tuple[str, ...]
    cgroups: tuple[str, ...]
    network_namespaces: tuple[str, ...]
    links: tuple[str, ...]
    files: tuple[str, ...]

    def less(self, other: "Inventory") -> dict[str, list[str]]:
        """Returns the objects that `other` lacks, by kind. Empty when nothing was left."""
        left = {
            each.name: sorted(set(getattr(self, each.name)) - set(getattr(other, each.name)))
            for each in fields(self)
        }
        return {kind: names for kind, names in left.items() if names}


def take(node: Enclosure) -> Inventory:
    """Returns everything of the node's that outlives a call."""
    return Inventory(
        processes=_processes(node),
        mounts=_mounts(node),
        cgroups=_cgroups(node),
        network_namespaces=_network_namespaces(node),
        links=_links(node),
        files=_files(node),
    )


def _processes(node: Enclosure) -> tuple[str, ...]:
    """Returns the number of processes of each command line in the node's cgroups.

    No pids: a restarted daemon is no left-over. Leaves out processes that bring a command in, too.
    """
    found: Counter[str] = Counter()
    for pid in pids(node):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            name = procfs.comm(pid).decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if ENTER not in command:
            found[f"{name}: {command[:160]}".strip()] += 1
    return tuple(sorted(f"{count} x {command}" for command, count in found.items()))


def pids(node: Enclosure) -> set[int]:
    """Returns the processes in the node's cgroups, as the host numbers them."""
    return {
        int(pid)
        for path in node.cgroups
        for procs in path.rglob("cgroup.procs")
        for pid in procs.read_text().split()
    }


def _mounts(node: Enclosure) -> tuple[str, ...]:
    """Returns mounts and their kinds, in the node and in namespaces that its processes made."""
    lines = Path(f"/proc/{node.pid}/mountinfo").read_text().splitlines()
    return tuple(sorted(f"{line.split()[4]} {line.split(' - ')[1].split()[0]}" for line in lines))


def _cgroups(node: Enclosure) -> tuple[str, ...]:
    paths = [below for path in node.cgroups for below in cgroups.below(path)]
    return tuple(sorted(str(path) for path in paths))


def _network_namespaces(node: Enclosure) -> tuple[str, ...]:
    """Returns namespaces that a process is in. (A namespace that a mount keeps shows among the
    mounts.)
    """
    found = set()
    for pid in pids(node):
        try:
            found.add(os.readlink(f"/proc/{pid}/ns/net"))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return tuple(sorted(found))


def _links(node: Enclosure) -> tuple[str, ...]:
    listed = json.loads(node.run(["ip", "--json", "link"]))
    names = {link["ifname"]: link["link_type"] for link in listed}
    return tuple(sorted(f"{name} {names[name]}" for name in names.keys() - set(KEPT_LINKS)))


def _files(node: Enclosure) -> tuple[str, ...]:
    found = []
    for watched in WATCHED:
        top = node.path(watched)
        for directory, names, files in os.walk(top):
            inside = Path(watched) / Path(directory).relative_to(top)
            found += [str(inside / name) for name in (*names, *files)]
    return tuple(sorted(set(found) - set(KEPT_FILES)))


@dataclass(frozen=True, slots=True)
class HostInventory:
    """Objects that nodes could leave on the machine of the test run."""

    mounts: tuple[str, ...]
    cgroups: tuple[str, ...]
    links: tuple[str, ...]
    processes: tuple[int, ...]
    runs: tuple[str, ...]


def take_host(test_pid: int) -> HostInventory:
    """Returns the objects of the nodes of process `test_pid` on this machine, and all that they
    could change.
    """
    named = of_process(test_pid)
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    made = [
        str(path)
        for each in cgroups.hierarchies()
        for path in each.mount_point.rglob(f"{cgroups.NAME_PREFIX}*{named}*")
    ]
    return HostInventory(
        mounts=tuple(sorted(line.split()[4] for line in lines)),
        cgroups=tuple(sorted(made)),
        links=tuple(sorted(path.name for path in Path("/sys/class/net").iterdir())),
        processes=tuple(cgroups.processes(named)),
        runs=tuple(sorted(path.name for path in RUNS.glob(f"*{named}*"))),
    )
