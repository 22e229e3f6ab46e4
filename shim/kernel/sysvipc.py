"""System V objects of an IPC namespace: segments of shared memory, semaphores, queues.

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
    from collections.abc import Iterator

KINDS: Final = ("shm", "sem", "msg")
_NUMBERS: Final = {"shm": "shmid", "sem": "semid", "msg": "msqid"}
_MOST = 1 << 16


@dataclass(frozen=True, slots=True)
class Object:
    """kind: a word of KINDS. creator: the host's number of the process that made it, or 0."""

    kind: str
    number: int
    key: int
    creator: int

    @property
    def name(self) -> str:
        """What it is called where numbers of several kinds are in one list."""
        return f"{self.kind}:{self.number}"

    def __str__(self) -> str:
        words = {"shm": "shared memory segment", "sem": "semaphore set", "msg": "message queue"}
        return f"System V {words[self.kind]} {self.number} (key {self.key & 0xFFFFFFFF:#x})"


def objects(namespace: str) -> list[Object]:
    """All of the IPC namespace at this path (`/proc/PID/ns/ipc`). Raises OSError, ValueError."""
    found: list[Object] = []
    failed: list[Exception] = []

    def look() -> None:
        try:
            setns(fd.fileno(), CLONE_NEWIPC)
            for kind in KINDS:
                found.extend(_listed(kind))
        except (OSError, ValueError) as error:
            failed.append(error)

    with OwnedFd(os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)) as fd:
        thread = threading.Thread(target=look, name="ipc")  # which keeps the namespace
        thread.start()
        thread.join()
    if failed:
        raise failed[0]
    return found


def _listed(kind: str) -> Iterator[Object]:
    with open(f"/proc/sysvipc/{kind}") as file:
        names = file.readline().split()
        for count, line in enumerate(file):
            if count >= _MOST:
                raise ValueError(f"more than {_MOST} System V objects")
            row = dict(zip(names, line.split(), strict=False))
            number, creator = int(row[_NUMBERS[kind]]), int(row.get("cpid", "0"))
            yield Object(kind, number, int(row["key"]), creator)
