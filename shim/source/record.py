"""Records the content of a pod's /dev/shm and IPC namespace at a container's creation.

Each container that opted in has two records, for root only: `before`, from its own creation, and
`others`, from the creation of the first other container after that. The container itself has made
all that is in the second record and not in the first, because nobody else was there. Without a
second record it has been the pod's only container. Bounded: NRI's caller waits.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shim.contract import jsontext
from shim.contract.paths import CONTAINER_POD_BEFORE, CONTAINER_POD_OTHERS, CONTAINERS
from shim.kernel import replace, sysvipc
from shim.kernel.beneath import O_WALK, open_dir
from shim.kernel.fds import OwnedFd

if TYPE_CHECKING:
    from collections.abc import Iterator

BEFORE: Final = CONTAINER_POD_BEFORE
OTHERS: Final = CONTAINER_POD_OTHERS
_SCHEMA = 1
_MOST_ENTRIES = 2000
_MOST_DEEP = 20
_MOST_S = 0.02
_MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class PodRecord:
    """inodes: of /dev/shm. objects: names of `shim.kernel.sysvipc`.

    is_whole: whether the record is complete: nothing was too much or unreadable.
    """

    inodes: frozenset[int]
    objects: frozenset[str]
    is_whole: bool


NOTHING_KNOWN: Final = PodRecord(frozenset(), frozenset(), is_whole=False)


class _TooMuch(Exception):
    """There is more than we look at while somebody waits."""


def take(shm: str, ipc: str) -> PodRecord:
    """Returns the present record. shm: the host's /dev/shm directory. ipc: the namespace's path.

    Each is empty if the container does not share it with the pod.
    """
    inodes: set[int] = set()
    try:
        if shm:
            until = time.monotonic() + _MOST_S
            with open_dir(shm) as top:
                for inode in _inodes(top.fileno(), _MOST_DEEP):
                    inodes.add(inode)
                    if len(inodes) > _MOST_ENTRIES or time.monotonic() > until:
                        raise _TooMuch
        there = sysvipc.objects(ipc, _MOST_ENTRIES) if ipc else []
        objects = frozenset(each.name for each in there)
    except (OSError, ValueError, _TooMuch):
        return NOTHING_KNOWN
    return PodRecord(frozenset(inodes), objects, is_whole=True)


def _inodes(dirfd: int, deep: int) -> Iterator[int]:
    if not deep:
        raise _TooMuch
    with os.scandir(dirfd) as listing:
        for entry in listing:
            yield entry.inode()
            if entry.is_dir(follow_symlinks=False):
                with (
                    contextlib.suppress(FileNotFoundError, NotADirectoryError),
                    OwnedFd(os.open(entry.name, O_WALK, dir_fd=dirfd)) as inner,
                ):
                    yield from _inodes(inner.fileno(), deep - 1)


def write(container: str, name: str, record: PodRecord) -> None:
    """Write the record to a place that is removed with the container. Raises OSError.

    name: BEFORE or OTHERS.
    """
    told = {
        "schema": _SCHEMA, "inodes": sorted(record.inodes), "objects": sorted(record.objects),
        "is_whole": record.is_whole,
    }  # fmt: skip
    replace.put(f"{CONTAINERS}/{container}/{name}", jsontext.compose(told))


def has(container: str, name: str) -> bool:
    """Returns whether there is such a record."""
    return os.path.exists(f"{CONTAINERS}/{container}/{name}")


def read(container: str, name: str) -> PodRecord | None:
    """Returns the record; None if missing. Raises OSError, ValueError for a malformed record."""
    path = f"{CONTAINERS}/{container}/{name}"
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            told = jsontext.parse(file.read(_MAX_BYTES))
    except FileNotFoundError:
        return None
    return parsed(told, path)


def parsed(told: object, path: str = "it") -> PodRecord:
    """The record that a file has. Raises ValueError for what is none."""
    found = told if isinstance(told, dict) else {}
    inodes, objects = found.get("inodes"), found.get("objects")
    if (
        found.get("schema") != _SCHEMA
        or not isinstance(inodes, list) or not all(type(each) is int for each in inodes)
        or not isinstance(objects, list) or not all(isinstance(each, str) for each in objects)
    ):  # fmt: skip
        raise ValueError(f"{path} is no record of a pod")
    return PodRecord(frozenset(inodes), frozenset(objects), is_whole=found.get("is_whole") is True)
