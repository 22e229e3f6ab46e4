"""Decides which /dev/shm files and System V objects of a pod are the captured container's own.

Both belong to the pod, and other containers of the pod use them. A container's own are the objects
that only its processes have open, mapped or attached, and the objects that it has made (see
`shim.source.record`). Objects of another container, and objects from before this container, stay
in the pod. If nobody can tell the owner, `Belongings` refuses the capture and names the object: in
a snapshot the object would be another container's secret, left out it would be missing.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from typing import TYPE_CHECKING

from shim.contract.errors import NotCapturable
from shim.kernel import filesystem, procfs, sharedobjects, sysvipc
from shim.kernel.beneath import open_dir
from shim.kernel.cgroup import siblings
from shim.kernel.stopping import Stop
from shim.source import record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Set

    from shim.source.source import Source

_TMPFS = 0x01021994


@dataclass(slots=True)
class _Held:
    """The objects that processes have open, mapped or attached.

    inodes: of /dev/shm. segments: their ids.
    """

    inodes: set[int] = field(default_factory=set)
    segments: set[int] = field(default_factory=set)


def checked(source: Source, stop: Stop | None = None) -> Belongings:
    """The belongings of a container. Raises NotCapturable where nothing can be told from inodes.

    stop: ends all later looks.
    """
    own = Belongings(source, stop)
    own.check()
    return own


class Belongings:
    """Of one capture. Raises OSError, ValueError when the records cannot be read.

    All that looks at processes may raise Stopped.
    """

    def __init__(self, source: Source, stop: Stop | None = None) -> None:
        self._source, self._stop = source, stop or Stop()
        self._before = record.read(source.container, record.BEFORE) or record.NOTHING_KNOWN
        others = record.read(source.container, record.OTHERS)
        self._is_alone = others is None and self._before.is_whole
        self._made_inodes: Set[int] = frozenset()
        self._made_objects: Set[str] = frozenset()
        if others and others.is_whole and self._before.is_whole:
            self._made_inodes = others.inodes - self._before.inodes
            self._made_objects = others.objects - self._before.objects
        self._pids: frozenset[int] = frozenset()
        self._device = os.stat(source.shm).st_dev if source.shm else 0

    def check(self) -> None:
        """Raises NotCapturable if the numbers of inodes tell nothing."""
        if not self._source.shm or self._is_alone:
            return
        with open_dir(self._source.shm) as shm:
            if filesystem.magic(shm.fileno()) != _TMPFS:
                raise self._refused("its /dev/shm is no tmpfs, and other containers use it")

    def looked_at(self, pids: Iterable[int]) -> None:
        """Set the captured processes; look again at their open, mapped and attached objects."""
        self._pids = frozenset(pids)
        for name in ("_mine", "_theirs"):
            self.__dict__.pop(name, None)

    def early(self, status: os.stat_result) -> bool:
        """Returns whether a file is surely the container's own, before anything is frozen."""
        return self._is_alone or status.st_ino in self._mine.inodes

    def file(self, status: os.stat_result, path: str) -> bool:
        """Returns whether a file of /dev/shm is the container's. Raises NotCapturable if unsure."""
        inode = status.st_ino
        was_before, was_made = inode in self._before.inodes, inode in self._made_inodes
        return self._is_own(
            f"/dev/shm/{path}", was_before, was_made=was_made,
            is_in=lambda held: inode in held.inodes,
        )  # fmt: skip

    def directory(self, status: os.stat_result, path: str, *, is_empty: bool) -> bool:
        """Returns the same for a directory. The content of a non-empty directory decides."""
        inode = status.st_ino
        if is_empty:
            return self.file(status, path)
        if inode in self._before.inodes:
            return False
        return self._is_alone or inode in self._made_inodes or inode in self._mine.inodes

    def foreign_objects(self, pids: Iterable[int]) -> list[sysvipc.Object]:
        """Returns the System V objects of others. pids: as for `looked_at`, frozen by now.

        Raises NotCapturable, OSError, ValueError.
        """
        self.looked_at(pids)
        if self._is_alone and not self._before.objects:
            return []
        found = []
        for each in sysvipc.objects(f"/proc/{self._source.pid}/ns/ipc"):
            made = each.name in self._made_objects or each.creator in self._pids
            was_before = each.name in self._before.objects
            is_in = partial(_has_attached, each)
            if not self._is_own(str(each), was_before, was_made=made, is_in=is_in):
                found.append(each)
        return found

    def _is_own(
        self, name: str, was_before: bool, *, was_made: bool, is_in: Callable[[_Held], bool]
    ) -> bool:
        if self._is_alone:
            return not was_before or is_in(self._mine)
        is_theirs = is_in(self._theirs)
        if is_in(self._mine):
            if is_theirs or was_before:
                why = "is in use in another one" if is_theirs else "was there before it"
                raise self._refused(f"{name} is in use in this container, and {why}")
            return True
        if was_before:
            return False
        if was_made:
            if is_theirs:
                raise self._refused(f"this container made {name}, and another one uses it")
            return True
        if is_theirs:
            return False
        raise self._refused(
            f"nobody can tell whether this or another container of the pod made {name}"
        )

    def _refused(self, why: str) -> NotCapturable:
        return NotCapturable(
            "cannot tell what is the container's own", about=self._source.container, why=why,
            do="Remove the object, or use it in a single container, or start this container first.",
        )  # fmt: skip

    @cached_property
    def _mine(self) -> _Held:
        return self._held_by(self._pids)

    @cached_property
    def _theirs(self) -> _Held:
        """All that other processes of the pod hold.

        By the pod's cgroup, which a process cannot leave, and by the IPC namespace: a process can
        make another namespace, and still has the pod's /dev/shm.
        """
        others = siblings(self._source.pid)
        namespace = os.readlink(f"/proc/{self._source.pid}/ns/ipc")
        for pid in procfs.pids():
            with contextlib.suppress(OSError):  # a dead process, or a kernel thread
                if os.readlink(f"/proc/{pid}/ns/ipc") == namespace:
                    others.add(pid)
        return self._held_by(others - self._pids)

    def _held_by(self, pids: Iterable[int]) -> _Held:
        held = _Held()
        for pid in pids:
            with contextlib.suppress(OSError):  # the process has ended
                self._look_at(pid, held)
        return held

    def _look_at(self, pid: int, held: _Held) -> None:
        links = (f"fd/{number}" for number in procfs.descriptors(pid))
        for link in chain(("cwd", "root"), links):
            self._stop.check()
            with contextlib.suppress(OSError):  # closed meanwhile
                status = os.stat(f"/proc/{pid}/{link}")
                if status.st_dev == self._device:
                    held.inodes.add(status.st_ino)
        device = procfs.device(self._device)
        for area in procfs.areas(pid, device):
            self._stop.check()
            if self._device and area.device == device:
                held.inodes.add(area.inode)
        held.segments.update(sharedobjects.segments(pid))


def _has_attached(wanted: sysvipc.Object, held: _Held) -> bool:
    return wanted.kind == "shm" and wanted.number in held.segments
