"""Cgroups of containers, v1 and v2: freeze, thaw, members, whom memory is charged to. Lean.

Source: the kernel's admin-guide, cgroup-v1/freezer-subsystem and cgroup-v2 (cgroup.freeze).
"""

from __future__ import annotations

import os
import time

from shim.kernel.mounts import read_mounts

_POLL_S = 0.001
_O_TELL = os.O_WRONLY | os.O_CLOEXEC


class Freezer:
    """The freezer of one cgroup. path: its directory, in the hierarchy that has a freezer."""

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path

    @classmethod
    def of(cls, pid: int) -> Freezer:
        """The freezer of the cgroup that process `pid` is in.

        Raises OSError, or ValueError when no mounted hierarchy with a freezer has it.
        """
        for controllers, path in _cgroups_of(pid):
            if controllers == "" or "freezer" in controllers.split(","):
                for directory in _mounted(controllers == "", path):
                    return cls(directory)
        raise ValueError(f"no freezer is mounted for process {pid}")

    def freeze(self, *, until: float) -> None:
        """Freeze every process in it. Raises TimeoutError at `until` (monotonic), OSError."""
        while not self._frozen(True):
            if time.monotonic() > until:
                raise TimeoutError(f"{self.path} did not freeze")
            time.sleep(_POLL_S)

    def thaw(self) -> None:
        """Let it run again; it is no error when it does. Raises OSError."""
        self._frozen(False)

    def pids(self) -> list[int]:
        """Its processes and those of the cgroups beneath. Raises OSError."""
        found = []
        for directory, _, _ in os.walk(self.path):
            with open(f"{directory}/cgroup.procs") as file:
                found += [int(line) for line in file]
        return found

    def _frozen(self, wanted: bool) -> bool:
        """Ask for the state and say whether the cgroup has it. v1 wants to be asked again."""
        if os.path.exists(f"{self.path}/freezer.state"):
            _write(f"{self.path}/freezer.state", "FROZEN" if wanted else "THAWED")
            with open(f"{self.path}/freezer.state") as file:
                return file.read().strip() == ("FROZEN" if wanted else "THAWED")
        _write(f"{self.path}/cgroup.freeze", "1" if wanted else "0")
        with open(f"{self.path}/cgroup.events") as file:
            return f"frozen {int(wanted)}" in file.read().splitlines()


class OomKills:
    """The OOM killer's count in one cgroup and those beneath. path: its directory.

    Sources: cgroup-v1/memory (memory.oom_control), cgroup-v2 (memory.events).
    """

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path

    @classmethod
    def of(cls, pid: int) -> OomKills:
        """Of the cgroup that process `pid` is in. Raises OSError, ValueError without one."""
        return cls(memory_cgroup(pid))

    def count(self) -> int:
        """How many processes were killed. Raises OSError when the cgroup is gone."""
        if os.path.exists(f"{self.path}/memory.events"):
            return _row(f"{self.path}/memory.events", "oom_kill")
        return sum(
            _row(f"{directory}/memory.oom_control", "oom_kill")
            for directory in _all_below(self.path)
        )


def memory_cgroup(pid: int) -> str:
    """The directory of the cgroup that counts the memory of process `pid`.

    Raises OSError, ValueError when none does.
    """
    for controllers, path in _cgroups_of(pid):
        if controllers == "" or "memory" in controllers.split(","):
            for directory in _mounted(controllers == "", path, "memory", "memory.stat"):
                return directory
    raise ValueError(f"no cgroup counts the memory of process {pid}")


def memory_used(pid: int) -> int:
    """Bytes that are charged to the cgroup of process `pid` now. Raises OSError, ValueError."""
    directory = memory_cgroup(pid)
    for name in ("memory.current", "memory.usage_in_bytes"):
        if os.path.exists(f"{directory}/{name}"):
            with open(f"{directory}/{name}") as file:
                return int(file.read())
    raise ValueError(f"{directory} does not tell its memory")


def _all_below(path: str) -> list[str]:
    """The cgroup and all beneath. Raises OSError when it is gone."""
    os.stat(path)
    return [directory for directory, _, _ in os.walk(path)]


def _row(path: str, name: str) -> int:
    """The number in a file's row. 0 where an older kernel has none. Raises OSError."""
    with open(path) as file:
        for line in file:
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0


class QuickMoves:
    """Has others move processes between cgroups without waiting, as long as `again` is called
    every few milliseconds.

    The first move for some time waits until all processors have noticed (cgroup_threadgroup_rwsem
    in kernel/cgroup/cgroup.c, kernel/rcu/sync.c): 5 to 16 ms, and those that follow at once do not.
    Ours are moves to where we are. Raises OSError; ValueError when no such cgroup is mounted.
    """

    def __init__(self) -> None:
        self._fd = os.open(_where_we_are(), _O_TELL)

    def again(self) -> None:
        """Move. The first one waits. Raises OSError."""
        os.write(self._fd, b"0")

    def close(self) -> None:
        """Move no more."""
        os.close(self._fd)


def _where_we_are() -> str:
    """cgroup.procs of a cgroup that this process is in, of any hierarchy."""
    for controllers, path in _cgroups_of("self"):
        for directory in _mounted(
            controllers == "", path, controllers.split(",")[0], "cgroup.procs"
        ):
            return f"{directory}/cgroup.procs"
    raise ValueError("no cgroup of this process is mounted")


def _cgroups_of(pid: int | str) -> list[tuple[str, str]]:
    """Controllers and path in each hierarchy; those of v1 first, which runc too prefers."""
    with open(f"/proc/{pid}/cgroup", errors="surrogateescape", newline="\n") as file:
        lines = [line.rstrip("\n").split(":", 2) for line in file]
    return sorted(((line[1], line[2]) for line in lines), key=lambda each: each[0] == "")


def charge_to(pid: int) -> None:
    """Have what this process allocates from now on be charged to the cgroup of process `pid`.

    It becomes a member. Memory is charged to whoever touches it first, also memory of a file that
    somebody else has made. Raises OSError, ValueError when no cgroup there counts memory.
    """
    _write(f"{memory_cgroup(pid)}/cgroup.procs", str(os.getpid()))


def _mounted(
    unified: bool, path: str, controller: str = "freezer", control: str = ""
) -> list[str]:  # fmt: skip
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
