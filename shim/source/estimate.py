"""Estimates the size of a capture before its start. Blocking."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shim.contract import limits
from shim.contract.paths import SNAPSHOTS
from shim.kernel import procfs
from shim.kernel.beneath import O_WALK, open_dir
from shim.kernel.cgroup import memory_used
from shim.kernel.fds import OwnedFd
from shim.rootfs import overlay
from shim.source import opened
from shim.source.source import own_freezer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shim.kernel.stopping import Stop
    from shim.source.source import Source

_BLOCK_BYTES = 512
_IN_MEMORY = ("/dev/shm/", "/memfd:", "/SYSV", "/dev/zero", "/anon_hugepage")
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


@dataclass(frozen=True, slots=True)
class Amount:
    """size_bytes: on disk, with the cost of each entry. entries: inodes."""

    size_bytes: int
    entries: int

    @property
    def content_bytes(self) -> int:
        """The bytes without the cost of the entries."""
        return self.size_bytes - self.entries * limits.ENTRY_BYTES

    def plus(self, other: Amount) -> Amount:
        """Returns the sum."""
        return Amount(self.size_bytes + other.size_bytes, self.entries + other.entries)

    def less(self, other: Amount) -> Amount:
        """Returns the difference."""
        return Amount(self.size_bytes - other.size_bytes, self.entries - other.entries)


def estimate(source: Source, stop: Stop) -> Amount:
    """Returns the size of a snapshot of the container in its present state.

    Counts memory that several processes share once, and counts no more memory than the kernel
    charges to the container's cgroup: whatever processes do to the accounts of their pages, the
    snapshots of others do not leave for more than that. Raises TooMuch if the files cannot be
    captured at all; Stopped, OSError, ValueError.
    """
    mounted = overlay.read_overlay(source.rootfs)
    diffs = [path for path in mounted.absolute_lowerdirs() if path.startswith(f"{SNAPSHOTS}/")]
    directories = [mounted.upperdir, *diffs, *filter(None, [source.shm])]
    pids = own_freezer(source).pids()
    in_memory, swapped = memory(pids)
    found = Amount(min(in_memory, memory_used(source.pid)) + swapped, 0).plus(deleted(pids, stop))
    for each in directories:
        found = found.plus(amount(each, stop))
    return found


def deleted(pids: Iterable[int], stop: Stop) -> Amount:
    """Returns the bytes of open files without a name: CRIU's images hold such files.

    But for those that count as memory. Raises TooMuch, Stopped.
    """
    found: dict[tuple[int, int], int] = {}
    for pid in pids:
        for link in opened.links(pid):
            stop.check()
            try:
                name = os.readlink(link)
                if not name.endswith(opened.GONE) or name.startswith(_IN_MEMORY):
                    continue
                status = os.stat(link)
            except OSError:
                continue  # closed meanwhile
            if stat.S_ISREG(status.st_mode) and not status.st_nlink:
                found[status.st_dev, status.st_ino] = status.st_blocks * _BLOCK_BYTES
                if len(found) > limits.MAX_OPENED:
                    raise limits.TooMuch("deleted files that are open", limits.MAX_OPENED)
    return Amount(sum(found.values()) + len(found) * limits.ENTRY_BYTES, len(found))


def memory(pids: Iterable[int]) -> tuple[int, int]:
    """Returns the bytes that the processes have in memory but in no file, and the swapped bytes.

    Each process has its share of a page that several processes have mapped (Pss), so the sum has
    the page once. Source: Documentation/ABI/testing/procfs-smaps_rollup.
    """
    in_memory, swapped = 0, 0
    for pid in pids:
        try:
            found = procfs.rollup(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
        in_memory += found.get("Pss_Anon", 0) + found.get("Pss_Shmem", 0)
        swapped += found.get("SwapPss", 0)
    return in_memory, swapped


def amount(directory: str, stop: Stop, *, limited: bool = True) -> Amount:
    """Returns the size of all entries in the directory, on disk or in memory of a tmpfs.

    Does not count entries that vanish meanwhile. limited: raises TooMuch for more than a snapshot
    may hold. Raises Stopped, OSError.
    """
    found = [0, 0]
    with open_dir(directory) as dirfd:
        _add(found, dirfd.fileno(), stop, 0, limited=limited)
    return Amount(found[0] + found[1] * limits.ENTRY_BYTES, found[1])


def _add(found: list[int], dirfd: int, stop: Stop, depth: int, *, limited: bool) -> None:
    if depth > limits.MAX_DEPTH:
        if limited:
            raise limits.TooMuch("directories in each other", limits.MAX_DEPTH)
        return
    with os.scandir(dirfd) as entries:
        for entry in entries:
            stop.check()
            try:
                status = entry.stat(follow_symlinks=False)
                found[0] += status.st_blocks * _BLOCK_BYTES
                found[1] += 1
                if limited and found[1] > limits.MAX_ENTRIES:
                    raise limits.TooMuch("files and directories", limits.MAX_ENTRIES)
                if stat.S_ISDIR(status.st_mode):
                    with OwnedFd(os.open(entry.name, O_WALK, dir_fd=dirfd)) as inner:
                        _add(found, inner.fileno(), stop, depth + 1, limited=limited)
            except OSError as error:
                if error.errno not in _GONE:  # the container runs and removes what it likes
                    raise
