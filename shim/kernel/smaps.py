"""Reads the flags of a process's areas of memory. Source: proc_pid_smaps(5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from shim.kernel import procfs

_FLAGS: Final = b"VmFlags:"
WIPE_ON_FORK: Final = "wf"
DROPPABLE: Final = "dp"


@dataclass(frozen=True, slots=True)
class FlaggedArea:
    """start, end: addresses. flags: two letters each, as the kernel prints them."""

    start: int
    end: int
    flags: frozenset[str]


def areas(pid: int) -> list[FlaggedArea]:
    """Returns all areas of a process. Raises OSError; ValueError for a list of another form."""
    with open(f"/proc/{pid}/smaps", "rb") as file:
        return parsed(file.read())


def parsed(text: bytes) -> list[FlaggedArea]:
    """Returns the areas in the content of such a file. Raises ValueError."""
    found = []
    bounds: tuple[int, int] | None = None
    for line in text.split(b"\n"):
        first, _, rest = line.partition(b" ")
        if rest and not first.endswith(b":"):
            bounds = procfs.area(line).range
        elif line.startswith(_FLAGS):
            if bounds is None:
                raise ValueError("smaps has flags without an area")
            flags = line[len(_FLAGS) :].decode("ascii", "replace").split()
            found.append(FlaggedArea(*bounds, frozenset(flags)))
            bounds = None
    return found
