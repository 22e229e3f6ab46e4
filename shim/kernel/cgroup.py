"""Freezes and thaws cgroups, v1 and v2; lists members and memory, charges memory. Lean.

Source: the kernel's admin-guide, cgroup-v1/freezer-subsystem and cgroup-v2 (cgroup.freeze).
"""

from __future__ import annotations

import contextlib
import os
import time

from shim.kernel import procfs
from shim.kernel.mounts import read_mounts

_POLL_S = 0.001
_NO_LIMIT = 1 << 60
"""The first version shows the largest number of pages for no limit."""
_O_TELL = os.O_WRONLY | os.O_CLOEXEC


class Freezer:
    """The freezer of a cgroup. path: the cgroup's directory, in the hierarchy with a freezer."""

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path

    @classmethod
    def of(cls, pid: int) -> Freezer:
        """Returns the freezer of the cgroup of process `pid`.

        Raises OSError, or ValueError when no mounted hierarchy with a freezer has the cgroup.
        """
        for controllers, path in cgroups_of(pid):
            if controllers == "" or "freezer" in controllers.split(","):
                for directory in _mounted(controllers == "", path):
                    return cls(directory)
        raise ValueError(f"no freezer is mounted for process {pid}")

    def freeze(self, *, until: float) -> None:
        """Freeze every process. Raises TimeoutError at `until` (monotonic), OSError."""
        while not self._frozen(True):
            if time.monotonic() > until:
                raise TimeoutError(f"{self.path} did not freeze")
            time.sleep(_POLL_S)

    def thaw(self) -> None:
        """Let the processes run again; does nothing if they run. Raises OSError."""
        self._frozen(False)

    def pids(self) -> list[int]:
        """Returns the processes of the cgroup and of the cgroups beneath. Raises OSError."""
        found = []
        for directory, _, _ in os.walk(self.path):
            with open(f"{directory}/cgroup.procs") as file:
                found += [int(line) for line in file]
        return found

    def _frozen(self, wanted: bool) -> bool:
        """Request the state. Returns whether the cgroup has it. v1 needs repeated requests."""
        if os.path.exists(f"{self.path}/freezer.state"):
            _write(f"{self.path}/freezer.state", "FROZEN" if wanted else "THAWED")
            with open(f"{self.path}/freezer.state") as file:
                return file.read().strip() == ("FROZEN" if wanted else "THAWED")
        _write(f"{self.path}/cgroup.freeze", "1" if wanted else "0")
        with open(f"{self.path}/cgroup.events") as file:
            return f"frozen {int(wanted)}" in file.read().splitlines()


def siblings(pid: int) -> set[int]:
    """Returns the processes of the cgroup around the cgroup of process `pid`, with all beneath.

    Around a container's cgroup that is the pod's. No namespace that a process enters or makes lets
    it leave this cgroup. Raises OSError, ValueError as `Freezer.of`.
    """
    own = Freezer.of(pid).path
    around = os.path.dirname(own)
    if not os.path.exists(f"{around}/cgroup.procs"):
        around = own  # the root of the hierarchy
    found: set[int] = set()
    for directory, _, _ in os.walk(around):
        with contextlib.suppress(OSError), open(f"{directory}/cgroup.procs") as file:
            found.update(int(line) for line in file)  # else it was removed meanwhile
    return found


class OomKills:
    """The OOM killer's count in a cgroup and the cgroups beneath. path: the cgroup's directory.

    Sources: cgroup-v1/memory (memory.oom_control), cgroup-v2 (memory.events).
    """

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path

    @classmethod
    def of(cls, pid: int) -> OomKills:
        """Returns the count of the cgroup of process `pid`. Raises OSError, ValueError if none."""
        return cls(memory_cgroup(pid))

    def count(self) -> int:
        """Returns how many processes were killed. Raises OSError when the cgroup is gone."""
        if os.path.exists(f"{self.path}/memory.events"):
            return _row(f"{self.path}/memory.events", "oom_kill")
        return sum(
            _row(f"{directory}/memory.oom_control", "oom_kill")
            for directory in _all_below(self.path)
        )


def memory_cgroup(pid: int) -> str:
    """Returns the directory of the cgroup that counts the memory of process `pid`.

    Raises OSError, ValueError when no cgroup counts it.
    """
    for controllers, path in cgroups_of(pid):
        if controllers == "" or "memory" in controllers.split(","):
            for directory in _mounted(controllers == "", path, "memory", "memory.stat"):
                return directory
    raise ValueError(f"no cgroup counts the memory of process {pid}")


def memory_used(pid: int) -> int:
    """Returns the bytes charged to the cgroup of process `pid` now. Raises OSError, ValueError."""
    directory = memory_cgroup(pid)
    for name in ("memory.current", "memory.usage_in_bytes"):
        if os.path.exists(f"{directory}/{name}"):
            with open(f"{directory}/{name}") as file:
                return int(file.read())
    raise ValueError(f"{directory} does not tell its memory")


def _all_below(path: str) -> list[str]:
    """Returns the cgroup and all cgroups beneath. Raises OSError when the cgroup is gone."""
    os.stat(path)
    return [directory for directory, _, _ in os.walk(path)]


def _row(path: str, name: str) -> int:
    """Returns the number in a file's row. 0 if an older kernel has no such row. Raises OSError."""
    with open(path) as file:
        for line in file:
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0


class QuickMoves:
    """Keeps moves between cgroups quick for all processes, while `again` is called every few
    milliseconds.

    The first move after a pause waits until all processors have noticed (cgroup_threadgroup_rwsem
    in kernel/cgroup/cgroup.c, kernel/rcu/sync.c): 5 to 16 ms; moves that follow at once do not
    wait. We move to where we are. Raises OSError; ValueError when no such cgroup is mounted.
    """

    def __init__(self) -> None:
        self._fd = os.open(_where_we_are(), _O_TELL)

    def again(self) -> None:
        """Move. The first move waits. Raises OSError."""
        os.write(self._fd, b"0")

    def close(self) -> None:
        """Stop moving."""
        os.close(self._fd)


def _where_we_are() -> str:
    """Returns cgroup.procs of a cgroup of this process, of any hierarchy."""
    for controllers, path in cgroups_of("self"):
        for directory in _mounted(
            controllers == "", path, controllers.split(",")[0], "cgroup.procs"
        ):
            return f"{directory}/cgroup.procs"
    raise ValueError("no cgroup of this process is mounted")


def cgroups_of(pid: int | str, proc: str = procfs.PROC) -> list[tuple[str, str]]:
    """Returns controllers and path in each hierarchy; v1 first, which runc prefers, too.

    pid: or `self`. Raises OSError.
    """
    return sorted(procfs.cgroups(pid, proc), key=lambda each: each[0] == "")


def charge_to(pid: int) -> None:
    """Charge this process's further allocations to the cgroup of process `pid`, as its member.

    The kernel charges memory to the first process that touches it, even memory of a file that
    somebody else has made. Raises OSError, ValueError when no cgroup there counts memory.
    """
    _write(f"{memory_cgroup(pid)}/cgroup.procs", str(os.getpid()))


def memory_room(pid: int) -> int | None:
    """How many bytes the cgroups of process `pid` can still be charged with; None for no limit.

    Cache counts as room. Raises OSError, ValueError.
    """
    rooms: list[int] = []
    for controllers, path in cgroups_of(pid):
        if controllers == "" or "memory" in controllers.split(","):
            for directory in _mounted(controllers == "", path, "memory", "memory.stat"):
                while os.path.exists(f"{directory}/memory.stat"):
                    rooms += _room(directory)
                    directory = os.path.dirname(directory)
    return min(rooms, default=None)


def _room(directory: str) -> list[int]:
    """The room in one cgroup, nothing where it has no limit (the root of v2 has no such file)."""
    for limit, used, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        if os.path.exists(f"{directory}/{limit}"):
            with open(f"{directory}/{limit}") as file:
                most = file.read().strip()
            if not most.isdecimal() or int(most) >= _NO_LIMIT:
                return []
            with open(f"{directory}/{used}") as file:
                current = int(file.read())
            return [max(0, int(most) - current + _cached(directory, prefix))]
    return []


def _cached(directory: str, prefix: str) -> int:
    with open(f"{directory}/memory.stat") as file:
        rows = dict(line.split() for line in file)
    names = (f"{prefix}inactive_file", f"{prefix}active_file")
    return sum(int(rows.get(name, 0)) for name in names)


def _mounted(unified: bool, path: str, controller: str = "freezer", control: str = "") -> list[str]:
    found = []
    for mount in read_mounts():
        options = mount.super_options.split(",")
        fits = mount.fstype == ("cgroup2" if unified else "cgroup")
        if not fits or not (unified or controller in options):
            continue
        root = "" if mount.root == "/" else mount.root
        if path == root or path.startswith(f"{root}/"):
            directory = mount.target + path[len(root) :]
            wanted = control or ("cgroup.freeze" if unified else "freezer.state")
            if os.path.exists(f"{directory}/{wanted}"):
                found.append(directory)
    return found


def _write(path: str, value: str) -> None:
    with open(path, "w") as file:
        file.write(value)
