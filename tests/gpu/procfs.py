"""The state of a process under test from /proc: areas, descriptors, threads; and its changes."""

import contextlib
import os
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Final

from shim.kernel import procfs

KIB: Final = 1024
MIB: Final = 1 << 20
_KEPT: Final = ("Rss", "Private_Dirty", "Shared_Dirty", "Locked", "KernelPageSize", "MMUPageSize")
_KEPT_TOO: Final = ("AnonHugePages", "ShmemPmdMapped", "THPeligible")


@dataclass(frozen=True, slots=True)
class Area:
    """One entry of smaps; sizes in bytes."""

    start: int
    end: int
    perms: str
    offset: int
    inode: int
    path: str
    sizes: dict[str, int]
    flags: str

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def rss(self) -> int:
        return self.sizes.get("Rss", 0)

    @property
    def shared(self) -> bool:
        return self.perms.endswith("s")

    @property
    def kind(self) -> str:
        """In the words of the questions: memfd, /dev/zero, anonymous, a device, a file."""
        if self.path.startswith("/dev/nvidia") or self.path == "/dev/nvidiactl":
            return f"device {self.path}"
        if self.path.startswith("/memfd:"):
            return "memfd " + self.path
        if self.path.startswith("/dev/zero"):
            return "/dev/zero"
        if not self.path or self.path.startswith("["):
            return self.path or "anonymous"
        return "file" if "(deleted)" not in self.path else f"deleted {self.path}"

    @property
    def name(self) -> str:
        """Of its file in /proc/PID/map_files."""
        return f"{self.start:x}-{self.end:x}"

    def shown(self) -> dict[str, Any]:
        """For the results."""
        sizes = {key: value for key, value in self.sizes.items() if value}
        return {"range": self.name, "perms": self.perms, "kind": self.kind, "size": self.size} | {
            "flags": self.flags,
            **sizes,
        }


def areas(pid: int) -> list[Area]:
    """All of smaps. Raises OSError when the process is gone."""
    found: list[Area] = []
    with open(f"/proc/{pid}/smaps", "rb") as file:
        for line in file:
            name, _, value = line.decode(errors="replace").partition(":")
            if not name[:1].isupper():
                head = procfs.area(line)
                rights, path = head.rights.decode(), head.path
                found.append(Area(*head.range, rights, head.offset, head.inode, path, {}, ""))
            elif name == "VmFlags":
                found[-1] = replace(found[-1], flags=value.strip())
            elif name in _KEPT or name in _KEPT_TOO:
                unit = KIB if value.endswith("kB\n") else 1
                found[-1].sizes[name] = int(value.split()[0]) * unit
    return found


def descriptors(pid: int) -> dict[int, str]:
    """Returns the targets of all descriptors."""
    found = {}
    for entry in procfs.descriptors(pid):
        with contextlib.suppress(OSError):
            found[int(entry)] = os.readlink(f"/proc/{pid}/fd/{entry}")
    return found


def threads(pid: int) -> dict[int, str]:
    """Name and state of every thread."""
    found = {}
    for thread in procfs.threads(pid):
        with contextlib.suppress(OSError):
            task = f"{pid}/task/{thread}"
            found[thread] = f"{procfs.comm(task).decode(errors='replace')} {procfs.state(task)}"
    return found


@dataclass(frozen=True, slots=True)
class Look:
    """A process at one moment."""

    areas: list[Area]
    descriptors: dict[int, str]
    threads: dict[int, str]

    @classmethod
    def at(cls, pid: int) -> "Look":
        """Raises OSError when the process is gone."""
        return cls(areas(pid), descriptors(pid), threads(pid))

    def devices(self) -> dict[str, Any]:
        """Which /dev/nvidia* files are open or mapped."""
        mapped = Counter(area.path for area in self.areas if area.path.startswith("/dev/nvidia"))
        opened = Counter(p for p in self.descriptors.values() if p.startswith("/dev/nvidia"))
        return {"open": dict(opened), "mapped": dict(mapped)}

    def totals(self) -> dict[str, int]:
        """Resident MiB by kind, the small ones left out."""
        total: Counter[str] = Counter()
        for area in self.areas:
            total[f"{area.perms[3]} {area.kind}"] += area.rss
        return {kind: size // MIB for kind, size in total.most_common() if size >= MIB}


def grown(before: list[Area], after: list[Area], least: int = 64 * KIB) -> list[Area]:
    """Areas of `after`, no device's, with `least` bytes more resident than the same place had."""
    found = []
    for area in after:
        had = sum(old.rss for old in before if old.start < area.end and area.start < old.end)
        if not area.kind.startswith("device") and area.rss - had >= least:
            found.append(area)
    return found


def gone(before: list[Area], after: list[Area]) -> list[Area]:
    """Areas of `before` that have no counterpart of the same place and kind in `after`."""
    there = {(area.start, area.end, area.kind) for area in after}
    return [area for area in before if (area.start, area.end, area.kind) not in there]


def grouped(found: list[Area]) -> list[str]:
    """Areas alike in one line each: how many, permissions, kind, size, flags; largest first."""
    groups: Counter[tuple[str, str, int, str]] = Counter()
    for area in found:
        groups[area.perms, area.kind, area.size, area.flags] += 1
    ordered = sorted(groups.items(), key=lambda item: -item[0][2] * item[1])
    return [
        f"{count} x {size / MIB:.3f} MiB {perms} {kind} [{flags}]"
        for (perms, kind, size, flags), count in ordered
    ]


def changes(before: Look, after: Look) -> dict[str, Any]:
    """Returns the effects of a step on a process, for the results."""
    more, less = grown(before.areas, after.areas), gone(before.areas, after.areas)
    opened = {n: p for n, p in after.descriptors.items() if before.descriptors.get(n) != p}
    closed = {n: p for n, p in before.descriptors.items() if after.descriptors.get(n) != p}
    return {
        "grown": grouped(more)[:40],
        "grown_bytes": sum(area.rss for area in more),
        "gone": grouped(less)[:25],
        "opened": dict(Counter(opened.values())),
        "closed": dict(Counter(closed.values())),
        "threads_new": [n for t, n in after.threads.items() if t not in before.threads],
        "threads_gone": [n for t, n in before.threads.items() if t not in after.threads],
        "devices": after.devices(),
        "resident": after.totals(),
    }
