"""Finds and reads shared memory of other processes: memfds, shared anonymous memory, segments.

All of it lies in a tmpfs of the kernel's own, which is mounted nowhere. A path of a container may
look like the name of such an object, and must never be opened: so we identify an object by the
kernel's mount, whose numbers anybody who makes a memfd can learn. Not hugetlb. Sources:
proc_pid_maps(5), proc_pid_map_files(5), proc_pid_fdinfo(5), memfd_create(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import stat
from itertools import chain, islice
from typing import TYPE_CHECKING

from shim.kernel import procfs
from shim.kernel.beneath import by_descriptor
from shim.kernel.fds import OwnedFd
from shim.kernel.libc import copy_memory, mapped_shared
from shim.kernel.othermemory import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from shim.kernel.othermemory import Range

_MEMFD, _SEGMENT = "/memfd:", b"/SYSV"
_MOST_OBJECTS, _MOST_DESCRIPTORS = 512, 1 << 16
_O_LOOK = os.O_RDONLY | os.O_CLOEXEC | os.O_NOATIME


def found(pids: Iterable[int]) -> dict[int, str]:
    """Returns a path for each object that a process has mapped or open, by its number.

    The number is the inode's, or the id of a System V segment; a number of both a segment and
    another object is left out. A process that has ended has no objects. Returns nothing at all when
    there are more than any server has: the caller opens each, and the processes are not to be
    trusted.
    """
    paths: dict[int, str] = {}
    segments: set[int] = set()
    others: set[int] = set()
    descriptors = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            names = list(islice(procfs.descriptors(pid), _MOST_DESCRIPTORS + 1 - descriptors))
            descriptors += len(names)
            if descriptors > _MOST_DESCRIPTORS:
                return {}
            for number, path, is_segment in chain(_mapped(pid), _open(pid, names)):
                paths.setdefault(number, path)
                (segments if is_segment else others).add(number)
                if len(paths) > _MOST_OBJECTS:
                    return {}
    return {number: path for number, path in paths.items() if number not in segments & others}


def _mapped(pid: int) -> Iterator[tuple[int, str, bool]]:
    device, _ = _mount()
    for area in procfs.areas(pid, device):
        if area.device == device and area.name:
            path = f"/proc/{pid}/map_files/{area.map_file}"
            yield area.inode, path, area.name.startswith(_SEGMENT)


def segments(pid: int) -> set[int]:
    """Returns the ids of the System V segments that a process has attached. Raises OSError."""
    return {number for number, _, is_segment in _mapped(pid) if is_segment}


def _open(pid: int, descriptors: Iterable[str]) -> Iterator[tuple[int, str, bool]]:
    _, mount = _mount()
    for name in descriptors:
        with contextlib.suppress(OSError):  # closed meanwhile
            path = f"/proc/{pid}/fd/{name}"
            if os.readlink(path).startswith(_MEMFD):
                its = procfs.fdinfo(pid, name)
                if its.get("mnt_id") == mount:
                    yield int(its["ino"]), path, False


@functools.cache
def _mount() -> tuple[bytes, str]:
    """Returns the device of the kernel's tmpfs, as maps has it, and the id of its mount."""
    device = _device()
    with OwnedFd(os.memfd_create("quickthaw")) as fd:
        number = procfs.fdinfo("self", fd.fileno())["mnt_id"]
    return procfs.device(device), number


@functools.cache
def _device() -> int:
    """Returns the device of the kernel's tmpfs."""
    with OwnedFd(os.memfd_create("quickthaw")) as fd:
        return os.fstat(fd.fileno()).st_dev


class OpenObject:
    """An object, opened for reading by a path of `found`. Methods raise OSError."""

    def __init__(self, path: str) -> None:
        # The process runs: its descriptor may be of a device or a fifo by now. O_PATH opens none.
        with OwnedFd(os.open(path, os.O_PATH | os.O_CLOEXEC)) as found:
            status = os.fstat(found.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_dev != _device():
                raise OSError(errno.ESTALE, "no object of shared memory any more", path)
            self._fd = os.open(by_descriptor(found.fileno()), _O_LOOK)

    def close(self) -> None:
        """Close the object."""
        os.close(self._fd)

    def pages(self) -> Iterator[Range]:
        """Yields the ranges of the object that have pages, in memory or swapped out."""
        end = 0
        while True:
            try:
                start = os.lseek(self._fd, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            end = -(-os.lseek(self._fd, start, os.SEEK_HOLE) // PAGE) * PAGE
            yield start // PAGE * PAGE, end

    def read(self, start: int, view: memoryview) -> int:
        """Read whole pages from an offset on. Returns the number of bytes read, whole pages.

        Pages that are not in memory read as zeros, and are not made.
        """
        done = 0
        while done < len(view):
            got = os.preadv(self._fd, [view[done:]], start + done)
            if not got:
                break
            done += got
        behind = -done % PAGE
        if behind:
            self._read_last(start + done + behind - PAGE, view[done + behind - PAGE :])
        return done + behind

    def _read_last(self, start: int, view: memoryview) -> None:
        """Read the page in which the object ends: its processes see the whole page."""
        with mapped_shared(self._fd, start + PAGE, writable=False) as address:
            # No signal comes if the object shrinks now.
            copy_memory(ctypes.addressof(ctypes.c_char.from_buffer(view)), address + start, PAGE)
