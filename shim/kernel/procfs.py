"""Parses the files of /proc/PID, each in a single place. Lean.

Every function raises OSError when the process has ended (FileNotFoundError, ProcessLookupError);
callers decide whether that matters. `pid` may be `self`; functions that take a `task` also take
`PID/task/TID`, for a single thread. `proc`: the mount point of procfs.

Users choose the names of processes and files, as any bytes. The kernel escapes line feeds alone,
so no function here splits lines at other characters, or expects UTF-8. Text has surrogate escapes
for bytes that are not UTF-8.

Sources: proc_pid_maps(5), proc_pid_smaps(5), proc_pid_status(5), proc_pid_stat(5),
proc_pid_cgroup(5), proc_pid_fd(5), proc_pid_fdinfo(5), proc_tid_children(5); fs/proc and
proc_task_name in the kernel.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

PROC = "/proc"
NO_DEVICE = b"00:00"
"""The device of memory without a file."""
_PIECE_BYTES = 8192
"""The kernel returns up to a page of whole lines at a time, more only if a line is longer."""
_NAME = 5
_PARENT, _START = 1, 19
"""Indices into the list of `stat`."""


class Area(tuple[bytes, ...]):
    """The fields of a line of `maps`, or of the first line of an entry of `smaps`, as bytes.

    Most callers look at an area or two of thousands, so the parser only splits lines: a tuple takes
    half of the time of an object with attributes.
    """

    __slots__ = ()

    @property
    def range(self) -> tuple[int, int]:
        """Returns the first address, and the address behind the last."""
        start, end = self[0].split(b"-")
        return int(start, 16), int(end, 16)

    @property
    def rights(self) -> bytes:
        """Returns the permissions, as in `rw-p`."""
        return self[1]

    @property
    def offset(self) -> int:
        """Returns the offset in the file, in bytes."""
        return int(self[2], 16)

    @property
    def device(self) -> bytes:
        """Returns the device of the file, `MAJOR:MINOR` in hexadecimal, or NO_DEVICE."""
        return self[3]

    @property
    def inode(self) -> int:
        """Returns the inode number of the file, or the id of a System V segment; else 0."""
        return int(self[4])

    @property
    def name(self) -> bytes:
        """Returns the path of the file, `[heap]` and so on, or nothing."""
        return self[_NAME] if len(self) > _NAME else b""

    @property
    def path(self) -> str:
        """Returns the name as text."""
        return os.fsdecode(self.name)

    @property
    def map_file(self) -> str:
        """Returns the name of the link in `map_files`: addresses without leading zeros."""
        return "{:x}-{:x}".format(*self.range)


def area(line: bytes) -> Area:
    """Returns the fields of a line. Raises ValueError if there are too few."""
    found = Area(line.rstrip(b"\n").split(None, _NAME))
    if len(found) < _NAME:
        raise ValueError(f"no line of maps: {line!r}")
    return found


def device(number: int) -> bytes:
    """Returns a device number (`st_dev`) in the form of `Area.device`."""
    return b"%02x:%02x" % (os.major(number), os.minor(number))


def areas(pid: int | str, part: bytes = b"", proc: str = PROC) -> Iterator[Area]:
    """Yields the mappings of a process, in the order of addresses.

    part: only of lines that contain it. That saves most of the time, and may be true of other
    fields than the caller means.
    """
    for piece in _pieces(f"{proc}/{pid}/maps"):
        if part in piece:
            for line in piece.split(b"\n"):
                if not part or part in line:
                    yield Area(line.split(None, _NAME))


def has_mapped(pid: int | str, part: bytes, proc: str = PROC) -> bool:
    """Whether a line of `maps` contains `part`, such as a part of a file's path."""
    return any(part in piece for piece in _pieces(f"{proc}/{pid}/maps"))


def status(task: int | str, proc: str = PROC) -> dict[str, str]:
    """Returns the fields of `status` by name. Values are as the kernel writes them, with padding.

    In a name of a process the kernel has escaped line feeds and backslashes.
    """
    return fields(_read(f"{proc}/{task}/status"))


def fdinfo(pid: int | str, fd: int | str, proc: str = PROC) -> dict[str, str]:
    """Returns the fields of a descriptor by name, without those of other forms (epoll, inotify)."""
    return fields(_read(f"{proc}/{pid}/fdinfo/{fd}"))


def fields(text: bytes) -> dict[str, str]:
    """Returns the lines `NAME:<tab>VALUE` of a text as a dictionary, the others left out."""
    rows = (line.partition(":\t") for line in os.fsdecode(text).split("\n"))
    return {name: value for name, tab, value in rows if tab}


def memory(pid: int | str, proc: str = PROC) -> dict[str, int]:
    """Returns the amounts of memory in `status` (VmRSS and so on), in bytes."""
    return sizes(_read(f"{proc}/{pid}/status"))


def rollup(pid: int | str, proc: str = PROC) -> dict[str, int]:
    """Returns the sums over all mappings in `smaps_rollup`, in bytes.

    The kernel walks the page tables of all mappings meanwhile, and holds their lock.
    """
    return sizes(_read(f"{proc}/{pid}/smaps_rollup"))


def sizes(text: bytes) -> dict[str, int]:
    """Returns the lines `NAME: NUMBER kB` of a text as a dictionary, in bytes; no other lines."""
    found = {}
    for line in text.split(b"\n"):
        name, _, value = line.partition(b":")
        number, _, unit = value.strip().partition(b" ")
        if unit == b"kB" and number.isdigit():
            found[os.fsdecode(name)] = int(number) * 1024
    return found


def numbers(task: int | str, proc: str = PROC) -> list[int]:
    """Returns the pid in each PID namespace, from the namespace of `proc` inwards."""
    found = status(task, proc).get("NSpid")
    if not found:
        raise ProcessLookupError(f"process {task} has no NSpid in its status")
    return [int(number) for number in found.split()]


def stat(task: int | str, proc: str = PROC) -> list[str]:
    """Returns the fields of `stat` behind the name, which may have spaces and parentheses.

    The first is the state; field N of the manual page has the index N - 3.
    """
    return stat_fields(_read(f"{proc}/{task}/stat"))


def stat_fields(text: bytes) -> list[str]:
    """Returns the fields behind the name of a text from `stat`."""
    return text.rpartition(b")")[2].decode().split()


def state(task: int | str, proc: str = PROC) -> str:
    """Returns the letter of the state: R, S, D, T (stopped), t (traced), Z, X, I."""
    return stat(task, proc)[0]


def parent(pid: int | str, proc: str = PROC) -> int:
    """Returns the pid of the parent, 0 if that is outside of the PID namespace."""
    return int(stat(pid, proc)[_PARENT])


def start_ticks(pid: int | str, proc: str = PROC) -> int:
    """Returns the start of a living process, in clock ticks since boot: its identity with the pid.

    Raises ProcessLookupError for a zombie.
    """
    found = stat(pid, proc)
    if found[0] in ("Z", "X"):
        raise ProcessLookupError(f"process {pid} has ended")
    return int(found[_START])


def comm(task: int | str, proc: str = PROC) -> bytes:
    """Returns the name of a process or thread, which can have any bytes."""
    return _read(f"{proc}/{task}/comm").removesuffix(b"\n")


def cgroups(pid: int | str, proc: str = PROC) -> list[tuple[str, str]]:
    """Returns controllers and path in each hierarchy. Version 2 has no controllers here."""
    return cgroup_rows(_read(f"{proc}/{pid}/cgroup"))


def cgroup_rows(text: bytes) -> list[tuple[str, str]]:
    """Returns controllers and path of each line of a text from `cgroup`."""
    rows = (line.split(":", 2) for line in os.fsdecode(text).split("\n") if line)
    return [(controllers, path) for _, controllers, path in rows]


def pids(proc: str = PROC) -> list[int]:
    """Returns all processes."""
    return [int(name) for name in os.listdir(proc) if name.isdecimal()]


def threads(pid: int | str, proc: str = PROC) -> list[int]:
    """Returns the threads of a process."""
    return [int(name) for name in os.listdir(f"{proc}/{pid}/task")]


def children(pid: int | str, proc: str = PROC) -> list[int]:
    """Returns the children of all threads of a process. Raises OSError also if a thread ends."""
    return [child for thread in threads(pid, proc) for child in of_thread(pid, thread, proc)]


def of_thread(pid: int | str, thread: int, proc: str = PROC) -> list[int]:
    """Returns the children of a single thread."""
    return [int(child) for child in _read(f"{proc}/{pid}/task/{thread}/children").split()]


def descriptors(pid: int | str, proc: str = PROC) -> Iterator[str]:
    """Yields the numbers of the open files, as text: a process may have a million of them."""
    return _entries(f"{proc}/{pid}/fd")


def map_files(pid: int | str, proc: str = PROC) -> Iterator[str]:
    """Yields the ranges of addresses that have a file, as in `Area.map_file`."""
    return _entries(f"{proc}/{pid}/map_files")


def _entries(directory: str) -> Iterator[str]:
    with os.scandir(directory) as found:
        for entry in found:
            yield entry.name


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _pieces(path: str) -> Iterator[bytes]:
    """Yields a file in pieces of whole lines, without the last line feed of each.

    A container decides the length of its `maps`: up to 4 KiB for each mapping.
    """
    with open(path, "rb", buffering=0) as file:
        rest = b""
        while piece := file.read(_PIECE_BYTES):
            lines, feed, rest = (rest + piece).rpartition(b"\n")
            if feed:
                yield lines
