"""The source of a capture as the kernel sees it, to compare before and after.

A capture freezes processes, has CRIU run code of its own in them, and reads all of their memory.
Afterwards they must be as before: in the objects that they hold, in their needs, in their way of
running.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shim.kernel import procfs
from tests.node.kubelet import Container

KINDS: Final = (
    *("Rss", "Pss_Anon", "Pss_Shmem", "Anonymous", "AnonHugePages", "KSM", "Swap"),
    *("Shared_Hugetlb", "Private_Hugetlb", "Locked"),
)
"""Of smaps_rollup. Not the shares of files: other pods map the same libraries."""
COUNTERS: Final[tuple[str, ...]] = ("rss", "anon", "shmem", "rss_huge", "anon_thp", "swap")
"""Of memory.stat, version 1 and 2. Not the page cache, which the kernel drops at will."""
STATUS: Final = (
    *("State", "TracerPid", "Uid", "Gid", "Groups", "NSpid", "Threads", "NoNewPrivs", "Seccomp"),
    *("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt"),
    *("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "Cpus_allowed"),
)
"""Of a process's status: must be equal, but for a process that runs and one that sleeps."""
PROCESS_BYTES: Final = 2 << 20
"""How much of a kind a process may have more or less: a worker goes on serving, and CRIU changes
for a moment a page of code in each process, which stays a page of its own."""
CGROUP_BYTES: Final = 4 << 20
"""The same of the whole container's counters."""
QUIET_WITHIN_S: Final = 30.0
STANDS_FOR_S: Final = 0.5
STANDS_WITHIN_S: Final = 60.0
LOOK_EVERY_S: Final = 0.1
_SLEEPS: Final = "RSD"


@dataclass(frozen=True, slots=True)
class Process:
    """memory: bytes by kind. descriptors: target and flags by number. areas: VmFlags by address,
    rights, offset and name.
    """

    name: str
    memory: dict[str, int]
    status: dict[str, str]
    descriptors: dict[str, str]
    areas: dict[str, str]


@dataclass(frozen=True, slots=True)
class Source:
    """A container. kills: by the OOM killer in its cgroup. standing: the freezer's state when the
    container does not run.
    """

    processes: dict[int, Process]
    counters: dict[str, int]
    kills: int
    standing: str


def look(container: Container) -> Source:
    """Reads the container as it is now. Raises OSError when a process ends meanwhile."""
    processes = {pid: _process(pid) for pid in members(container)}
    memory = directory(container, "memory.stat")
    stat = _numbers(memory / "memory.stat")
    counters = {name: stat[name] for name in COUNTERS if name in stat}
    return Source(processes, counters, _kills(memory), frozen(container))


def settled(container: Container, *, stopped: bool = False) -> Source:
    """Reads the container once it stands still: connections closed, threads of requests ended.

    stopped: some processes may be stopped. Raises AssertionError with the activity that goes on.
    """
    deadline = time.monotonic() + STANDS_WITHIN_S
    while True:
        try:
            before = look(container)
            time.sleep(STANDS_FOR_S)
            after = look(container)
        except OSError as error:
            told = [str(error)]
        else:
            if not (told := harm(before, after, stopped=stopped)):
                return after
        assert time.monotonic() < deadline, "the source does not stand still:\n" + "\n".join(told)


def killed(container: Container) -> int:
    """Returns how many of the processes the OOM killer has killed; -1 when the cgroup is gone."""
    try:
        return _kills(directory(container, "memory.stat"))
    except FileNotFoundError:
        return -1


def charged(container: Container) -> int:
    """Returns the bytes of files, in memory, that are charged to the container's cgroup."""
    stat = _numbers(directory(container, "memory.stat") / "memory.stat")
    return stat["file"] if "file" in stat else stat["total_cache"]


def directory(container: Container, control: str) -> Path:
    """Returns the container's cgroup in the hierarchy that has the control."""
    for top in container.pod.node.cgroups:
        for found in top.rglob(f"*{container.id}*"):
            if (found / control).exists():
                return found
    raise FileNotFoundError(f"no cgroup of {container.id} has {control}")


def members(container: Container) -> list[int]:
    """Returns the container's processes, as the host numbers them."""
    text = (directory(container, "cgroup.procs") / "cgroup.procs").read_text()
    return sorted(int(pid) for pid in text.split())


def harm(before: Source, after: Source, *, stopped: bool = False) -> list[str]:
    """Returns every difference of the container from before, beyond the bounds. Empty: no harm.

    stopped: some processes may be stopped.
    """
    found = []
    if before.processes.keys() != after.processes.keys():
        gone = [before.processes[pid].name for pid in before.processes.keys() - after.processes]
        new = [after.processes[pid].name for pid in after.processes.keys() - before.processes]
        found.append(f"processes: gone {gone}, new {new}")
    if after.kills != before.kills:
        found.append(f"the OOM killer killed {after.kills - before.kills}")
    found += _beyond("cgroup", before.counters, after.counters, CGROUP_BYTES)
    for pid in sorted(before.processes.keys() & after.processes.keys()):
        found += _process_harm(before.processes[pid], after.processes[pid], pid)
    return found + wrong(after, stopped=stopped)


def wrong(source: Source, *, stopped: bool = False) -> list[str]:
    """Returns faults that no container may have after its capture, whatever its state before."""
    found = []
    if source.standing:
        found.append(f"it is frozen: {source.standing}")
    for pid, process in source.processes.items():
        told = f"{process.name} {pid}"
        if (
            process.status["State"][0] in ("t" if stopped else "Tt")
            or process.status["TracerPid"] != "0"
        ):
            state, tracer = process.status["State"], process.status["TracerPid"]
            found.append(f"{told}: state {state}, tracer {tracer}")
        found += [
            f"{told}: CRIU left {name}"
            for name in (*process.descriptors.values(), *process.areas)
            if "CRIU" in name or "criu" in name
        ]
    return found


def assert_unharmed(container: Container, before: Source, *, stopped: bool = False) -> None:
    """Assert that the container is as before, soon at least: begun work may have to end first.

    Raises AssertionError with every difference.
    """
    _assert_soon(lambda: harm(before, look(container), stopped=stopped))


def assert_sound(container: Container) -> None:
    """Assert that nothing is wrong with the source of a capture, whatever its state before. Raises
    as above.
    """
    _assert_soon(lambda: wrong(look(container)))


def _assert_soon(find: Callable[[], list[str]]) -> None:
    deadline = time.monotonic() + QUIET_WITHIN_S
    while True:
        try:
            told = find()
        except OSError as error:
            told = [f"a process ended meanwhile: {error}"]
        if not told:
            return
        assert time.monotonic() < deadline, "the source was harmed:\n" + "\n".join(told)
        time.sleep(LOOK_EVERY_S)


def _process_harm(before: Process, after: Process, pid: int) -> list[str]:
    told = f"{after.name} {pid}"
    found = _beyond(told, before.memory, after.memory, PROCESS_BYTES)
    for name, value in before.status.items():
        then, now = value, after.status[name]
        if name == "State" and then[0] in _SLEEPS and now[0] in _SLEEPS:
            continue
        if then != now:
            found.append(f"{told}: {name} was {then}, is {now}")
    found += _changed(f"{told}: descriptor", before.descriptors, after.descriptors)
    return found + _changed(f"{told}: area", before.areas, after.areas)


def _beyond(about: str, before: dict[str, int], after: dict[str, int], bound: int) -> list[str]:
    return [
        f"{about}: {kind} was {value / 2**20:.1f} MiB, is {after[kind] / 2**20:.1f}"
        for kind, value in before.items()
        if abs(after[kind] - value) > bound
    ]


def _changed(about: str, before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [
        f"{about} {key}: was {before.get(key, 'not there')}, is {after.get(key, 'not there')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _process(pid: int) -> Process:
    proc = Path(f"/proc/{pid}")
    memory, status = procfs.rollup(pid), procfs.status(pid)
    return Process(
        procfs.comm(pid).decode(errors="replace"),
        {kind: memory[kind] for kind in KINDS if kind in memory},
        {name: value for name, value in status.items() if name in STATUS},
        _descriptors(pid),
        _areas(proc),
    )


def _descriptors(pid: int) -> dict[str, str]:
    return {
        number: f"{os.readlink(f'/proc/{pid}/fd/{number}')} {procfs.fdinfo(pid, number)['flags']}"
        for number in procfs.descriptors(pid)
    }


def _areas(proc: Path) -> dict[str, str]:
    found, area = {}, ""
    for line in (proc / "smaps").read_text(errors="surrogateescape").splitlines():
        name, _, rest = line.partition(":")
        if name == "VmFlags":
            found[area] = rest.strip()
        elif "-" in name.split(" ", 1)[0]:
            area = " ".join(line.split())
    return found


def _numbers(path: Path) -> dict[str, int]:
    """Returns the rows of a file of names and numbers."""
    found = {}
    for line in path.read_text(errors="replace").splitlines():
        words = line.replace(":", " ").split()
        if len(words) > 1 and words[1].isdigit():
            found[words[0]] = int(words[1])
    return found


def _kills(memory: Path) -> int:
    for control in ("memory.events", "memory.oom_control"):
        if (memory / control).exists():
            return _numbers(memory / control).get("oom_kill", 0)
    raise FileNotFoundError(f"{memory} counts no kills")


def frozen(container: Container) -> str:
    """Returns the state of the container's freezer; empty when the container runs."""
    for control, thawed in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
        try:
            state = (directory(container, control) / control).read_text().strip()
        except FileNotFoundError:
            continue
        return "" if state == thawed else f"{control} is {state}"
    return ""
