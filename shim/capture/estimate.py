"""How much a capture will take, before it is begun. Blocking."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from shim.capture.source import own_freezer
from shim.contract.paths import SNAPSHOTS
from shim.kernel.cgroup import memory_used
from shim.rootfs import overlay

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shim.capture.source import Source

_BLOCK_BYTES = 512


def estimate(source: Source) -> int:
    """Bytes on disk of a snapshot of the container as it is now. Raises OSError, ValueError.

    Memory that several processes share counts once. No more memory than is charged to the
    container's cgroup: whatever processes do to the accounts of their pages, others' snapshots do
    not go for more than that.
    """
    mounted = overlay.read_overlay(source.rootfs)
    diffs = [path for path in mounted.absolute_lowerdirs() if path.startswith(f"{SNAPSHOTS}/")]
    directories = [mounted.upperdir, *diffs, *filter(None, [source.shm])]
    in_memory, swapped = memory(own_freezer(source).pids())
    in_memory = min(in_memory, memory_used(source.pid))
    return in_memory + swapped + sum(map(on_disk, directories))


def memory(pids: Iterable[int]) -> tuple[int, int]:
    """Bytes that the processes have in memory and in no file, and those that are swapped out.

    Each has its share of a page that several have mapped (Pss), so that all together have it once.
    Source: Documentation/ABI/testing/procfs-smaps_rollup.
    """
    in_memory, swapped = 0, 0
    for pid in pids:
        found = _rollup(pid)
        in_memory += found.get("Pss_Anon", 0) + found.get("Pss_Shmem", 0)
        swapped += found.get("SwapPss", 0)
    return in_memory, swapped


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


def _rollup(pid: int) -> dict[str, int]:
    """The rows of smaps_rollup in bytes; none when the process has ended."""
    found = {}
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            next(file, b"")  # the addresses
            for line in file:
                name, _, value = line.partition(b":")
                found[name.decode()] = int(value.split()[0]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return found
