"""Lists System V objects of an IPC namespace: segments of shared memory, semaphores, queues.

Source: sysvipc(7), proc_sysvipc(5). The files show the namespace of the thread that opens them.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shim.kernel.fds import OwnedFd
from shim.kernel.namespaces import CLONE_NEWIPC, setns

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

KINDS: Final = ("shm", "sem", "msg")
_NUMBERS: Final = {"shm": "shmid", "sem": "semid", "msg": "msqid"}
_MOST = 1 << 16


@dataclass(frozen=True, slots=True)
class Object:
    """A System V object. kind: a word of KINDS. creator: the creating process's host pid, or 0."""

    kind: str
    number: int
    key: int
    creator: int

    @property
    def name(self) -> str:
        """Returns the object's name in lists that contain several kinds."""
        return f"{self.kind}:{self.number}"

    def __str__(self) -> str:
        words = {"shm": "shared memory segment", "sem": "semaphore set", "msg": "message queue"}
        return f"System V {words[self.kind]} {self.number} (key {self.key & 0xFFFFFFFF:#x})"


def objects(namespace: str, most: int = _MOST) -> list[Object]:
    """Returns all objects of an IPC namespace (`/proc/PID/ns/ipc`).

    Raises OSError; ValueError for more than `most`.
    """
    found: list[Object] = []
    failed: list[Exception] = []

    def look() -> None:
        try:
            setns(fd.fileno(), CLONE_NEWIPC)
            for kind in KINDS:
                with open(f"/proc/sysvipc/{kind}") as file:
                    found.extend(listed(kind, file, most - len(found)))
        except (OSError, ValueError) as error:
            failed.append(error)

    with OwnedFd(os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)) as fd:
        thread = threading.Thread(target=look, name="ipc")  # the thread alone enters the namespace
        thread.start()
        thread.join()
    if failed:
        raise failed[0]
    return found


def listed(kind: str, file: Iterable[str], most: int = _MOST) -> Iterator[Object]:
    """Yields the objects of /proc/sysvipc/`kind`. Raises ValueError, also for more than `most`."""
    lines = iter(file)
    names = next(lines, "").split()
    for count, line in enumerate(lines):
        if count >= most:
            raise ValueError("too many System V objects")
        row = dict(zip(names, line.split(), strict=False))
        try:
            number, creator = int(row[_NUMBERS[kind]]), int(row.get("cpid", "0"))
            key = int(row["key"])
        except KeyError as error:
            raise ValueError(f"/proc/sysvipc/{kind} has no {error}") from error
        yield Object(kind, number, key, creator)
