"""The fact `volume_files`: what captured processes have open in volumes.

The restore compares it. Blocking, after the thaw: from what was seen in the frozen window, and from
CRIU's images.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from shim.capture.opened import GONE
from shim.contract.errors import NotCapturable
from shim.criu import images, openfiles
from shim.gate import volumes
from shim.gate.volumes import VolumeFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from shim.capture.opened import Opened
    from shim.capture.source import Source



def volume_files(
    source: Source, directory: Path, opened: Iterable[Opened], has: int
) -> dict[str, object]:
    """The fact, as a plain object.

    directory: CRIU's images. opened: all that the processes had open. has: the capabilities that
    the container's spec reaches. Raises NotCapturable for a file that the container's own
    credentials could not open; DamagedImage, OSError.
    """
    seen: dict[str, list[Opened]] = {}
    for each in opened:
        seen.setdefault(each.name, []).append(each)
    files, done = [], set()
    links = {f"/{remap.link}" for remap in images.link_remaps(directory)}
    for named in openfiles.named_files(directory):
        if named.path in links or not volumes.is_in(source.spec, named.path):
            continue
        found = _found(source, named.path, seen)
        writes = named.flags & os.O_ACCMODE != os.O_RDONLY
        if not volumes.may_open(source.spec, has, found[0].status, write=writes):
            raise _refused(
                source, f"{named.path}, of a volume, is open, and the container's user could not "
                f"open it: it belongs to {found[0].status.st_uid}:{found[0].status.st_gid} with "
                f"mode {found[0].status.st_mode:o}",
            )  # fmt: skip
        if named.path not in done:
            done.add(named.path)
            files.append(_record(named.path, found).as_json())
    sockets_in = [
        path for path in images.socket_directories(directory) if volumes.is_in(source.spec, path)
    ]
    return {"files": files, "sockets_in": sockets_in}


def _found(source: Source, path: str, seen: Mapping[str, list[Opened]]) -> list[Opened]:
    found = seen.get(path) or seen.get(f"{path}{GONE}")
    if not found:
        raise _refused(source, f"{path}, of a volume, is open in the queue of a socket alone")
    return found


def _record(path: str, found: list[Opened]) -> VolumeFile:
    status = found[0].status
    return VolumeFile(
        path=path, mode=status.st_mode, uid=status.st_uid, gid=status.st_gid,
        rdev=status.st_rdev, gone=found[0].name != path,
        at=[(each.number, each.link.split("/", 3)[3]) for each in found],
    )  # fmt: skip


def _refused(source: Source, why: str) -> NotCapturable:
    return NotCapturable(
        "cannot capture", container=source.container, why=why,
        do="Close it before the container is ready.",
    )  # fmt: skip
