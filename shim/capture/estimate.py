"""How much a capture will take, before it is begun. Blocking."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from shim.contract.paths import SNAPSHOTS
from shim.kernel.cgroup import Freezer
from shim.rootfs import overlay

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shim.capture.source import Source

_BLOCK_BYTES = 512


def estimate(source: Source) -> int:
    """Bytes on disk of a snapshot of the container as it is now. Raises OSError, ValueError.

    An estimate: private memory is counted for each process, as CRIU dumps it, and of shared
    memory the largest that one process has, because most often all have the same.
    """
    mounted = overlay.read_overlay(source.rootfs)
    diffs = [path for path in mounted.absolute_lowerdirs() if path.startswith(f"{SNAPSHOTS}/")]
    directories = [mounted.upperdir, *diffs, *filter(None, [source.shm])]
    return memory(Freezer.of(source.pid).pids()) + sum(map(on_disk, directories))


def memory(pids: Iterable[int]) -> int:
    """What the processes have in memory that is nowhere else. Source: proc_pid_status(5)."""
    private, shared = 0, 0
    for pid in pids:
        found = _status(pid)
        private += found.get("RssAnon", 0) + found.get("VmSwap", 0)
        shared = max(shared, found.get("RssShmem", 0))
    return private + shared


def on_disk(directory: str) -> int:
    """Bytes on disk, or in memory of a tmpfs, of all that is in it now."""
    found = 0
    for _, _, names, dirfd in os.fwalk(directory):
        for name in names:
            try:
                found += os.stat(name, dir_fd=dirfd, follow_symlinks=False).st_blocks * _BLOCK_BYTES
            except FileNotFoundError:
                continue  # the container runs and removes what it likes
    return found


def _status(pid: int) -> dict[str, int]:
    """The fields of /proc/PID/status that are an amount of memory, in bytes; none when it died."""
    found = {}
    try:
        with open(f"/proc/{pid}/status", errors="surrogateescape", newline="\n") as file:
            for line in file:
                name, _, value = line.partition(":")
                if value.rstrip().endswith(" kB"):
                    found[name] = int(value.split()[0]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return found
