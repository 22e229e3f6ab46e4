"""Has a restored container see its own cgroups at /sys/fs/cgroup, as a cold container does. Lean.

With cgroups of version 1 the runtime binds, of each hierarchy, the cgroup of the binding process.
At `create` that process is in the container's cgroups already; at `restore` it is the runtime
itself, and the container would see the cgroups of the runtime: on many nodes the root of every
hierarchy. So CRIU's options name other sources for these mounts: CRIU reads its options after the
runtime's request, and the last source counts. The directories exist by then: the runtime has made
them and moved CRIU there before it sends the request. Sources: runc, libcontainer/rootfs_linux.go,
getCgroupMounts, and criu_linux.go, criuApplyCgroups; CRIU, criu/cr-service.c and external.c.

With version 2 CRIU makes the cgroup namespace and the mount itself. `check` looks at the result of
both versions.
"""

from __future__ import annotations

import os
import posixpath
import select

from shim.contract.errors import Blame, SwapFailed
from shim.kernel.cgroup import cgroups_of
from shim.kernel.fds import OwnedFd
from shim.kernel.mounts import read_mounts
from shim.kernel.survivors import is_named

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from shim.kernel.mounts import Mount
    from shim.oci.spec import Spec

_MANAGED = frozenset({
    "blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "hugetlb", "memory", "misc",
    "name=systemd", "net_cls", "net_prio", "perf_event", "pids", "rdma",
})  # fmt: skip
"""The controllers for which the runtime makes a cgroup. In other hierarchies a container stays in
the runtime's own cgroup, which the runtime then binds, too. Source: runc, cgroups/fs/fs.go."""
_SLICE = ".slice"
_NOT_IN_OPTIONS = frozenset(" \t\n\"#'\\")
"""CRIU's options have comments and quotes."""


def sources(
    spec: Spec, container: str, *, is_systemd: bool, proc: str = "/proc/self"
) -> dict[str, str]:
    """Returns the directory for each mount that the runtime binds from its own cgroups, by place.

    spec: of the new container. is_systemd: whether systemd makes the container's cgroup. proc: of
    this process, which is in the runtime's cgroups. Raises OSError; SwapFailed if the spec's path
    of the cgroup is malformed.
    """
    try:
        return _sources(spec, container, is_systemd, proc)
    except ValueError as error:
        raise _other_cgroups(container, str(error)) from error


def _sources(spec: Spec, container: str, is_systemd: bool, proc: str) -> dict[str, str]:
    places = _places(spec)
    found = read_mounts(f"{proc}/mountinfo", "cgroup") if places else []
    if not found or _has_namespace(spec) or _is_unified(found):
        return {}
    own = dict(_by_controller(proc))
    path = _path(spec, container, is_systemd)
    seen: set[str] = set()
    chosen: dict[str, str] = {}
    for mount in found:
        controllers = own.keys() & set(mount.super_options.split(","))
        if not controllers - seen:
            continue  # the runtime takes the first mount of a hierarchy
        seen |= controllers
        if controllers & _MANAGED:
            below = path if path.startswith("/") else f"{_within(mount, own, controllers)}/{path}"
            directory = _plain(posixpath.normpath(f"{mount.target}/{below}"))
            name = posixpath.basename(mount.target)
            chosen |= {f"{place}/{name}": directory for place in places}
    return chosen


def check(spec: Spec, container: str, pid: int) -> None:
    """Check that a restored container is in its own cgroups, and sees them.

    pid: of its first process. Raises SwapFailed, OSError.
    """
    try:
        with OwnedFd(os.pidfd_open(pid)) as held:
            why = difference(spec, container, f"/proc/{pid}")
            if why and not select.select([held.fileno()], [], [], 0)[0]:
                raise _other_cgroups(container, why)
    except (ProcessLookupError, FileNotFoundError):
        return  # it has ended: its exit is reported like any other


def difference(spec: Spec, container: str, proc: str) -> str:
    """Returns how a container is not in its own cgroups, or sees others; or empty.

    proc: the directory of its first process in /proc. Raises OSError.
    """
    own = dict(_by_controller(proc))
    if not any(is_named(path, container) for path in own.values()):
        return f"the process is in {', '.join(sorted(set(own.values())))}"
    places = _places(spec)
    for mount in read_mounts(f"{proc}/mountinfo", "cgroup"):
        if not any(mount.target == each or mount.target.startswith(f"{each}/") for each in places):
            continue
        if mount.fstype == "cgroup2" and not _has_namespace(spec):
            continue  # without a namespace every container sees all
        controllers = [""] if mount.fstype == "cgroup2" else mount.super_options.split(",")
        paths = {own[each] for each in controllers if each in own}
        if not any(_is_in(path, mount.root, container) for path in paths):
            return f"{mount.target} shows the cgroup {mount.root}"
    return ""


def _is_in(path: str, root: str, container: str) -> bool:
    """Whether a process in the cgroup `path` may see all from `root` on.

    A container that may write to its cgroups can have made more beneath.
    """
    is_below = path.startswith(f"{root}/") and is_named(root, container)
    return path == root or is_below


def _other_cgroups(container: str, why: str) -> SwapFailed:
    error = SwapFailed(
        "the restored container does not see its own cgroups", about=container, why=why,
        do="Does the runtime make cgroups as runc does? See docs/security.md.",
    )  # fmt: skip
    error.blame = Blame.OTHER
    return error


def _places(spec: Spec) -> list[str]:
    """Returns where the container's spec has its cgroups."""
    return [mount.destination for mount in spec.mounts if mount.json.get("type") == "cgroup"]


def _has_namespace(spec: Spec) -> bool:
    return any(each.get("type") == "cgroup" for each in spec.namespaces)


def _is_unified(found: list[Mount]) -> bool:
    """Whether /sys/fs/cgroup itself is version 2. Source: runc, IsCgroup2UnifiedMode."""
    return any(each.fstype == "cgroup2" and each.target == "/sys/fs/cgroup" for each in found)


def _by_controller(proc: str) -> list[tuple[str, str]]:
    """Returns the path of the process's cgroup for each controller; "" for version 2."""
    directory, pid = os.path.split(proc)
    found = cgroups_of(pid, directory)
    return [(name, path) for names, path in found for name in names.split(",")]


def _path(spec: Spec, container: str, is_systemd: bool) -> str:
    """Returns the path that the runtime gives the container's cgroup in every hierarchy.

    A relative path is below the runtime's own cgroup. Source: runc, specconv/spec_linux.go.
    """
    told = spec.cgroups_path
    if not is_systemd:
        return _clean(told) if told else container
    parts = told.split(":") if told else ["", "runc", container]
    if len(parts) != 3:
        raise ValueError(f"cgroupsPath is {told!r:.200}, not slice:prefix:name")
    slice_name, prefix, name = parts
    unit = name if name.endswith(_SLICE) else f"{prefix}-{name}.scope"
    return f"{_expanded(slice_name or f'system{_SLICE}')}/{unit}"


def _clean(path: str) -> str:
    """Returns the path without parts that lead up. Source: runc, CleanPath."""
    if path.startswith("/"):
        return posixpath.normpath(path)
    return posixpath.normpath(f"/{path}").lstrip("/")


def _expanded(slice_name: str) -> str:
    """Returns the path of a slice: `a-b.slice` is below `a.slice`. Source: systemd.slice(5)."""
    stem = slice_name.removesuffix(_SLICE)
    parts = stem.split("-")
    if stem == "-":
        return ""
    if stem == slice_name or "/" in slice_name or not all(parts):
        raise ValueError(f"{slice_name!r:.200} is no name of a slice")
    return "".join(f"/{'-'.join(parts[: each + 1])}{_SLICE}" for each in range(len(parts)))


def _within(mount: Mount, own: Mapping[str, str], controllers: set[str]) -> str:
    """Returns the runtime's own cgroup, as a path below the mount."""
    path = own[min(controllers)]
    return posixpath.relpath(path, mount.root)


def _plain(path: str) -> str:
    """Returns the path. Raises ValueError if CRIU's options cannot have it."""
    if _NOT_IN_OPTIONS & set(path):
        raise ValueError(f"the cgroup {path!r:.200} has characters that no option may have")
    return path
