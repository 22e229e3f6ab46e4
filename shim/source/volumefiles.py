"""Makes the fact `volume_files`: the files in volumes that captured processes have open.

The restore compares the fact. Blocking, after the thaw: from the findings of the frozen window, and
from CRIU's images.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING

from shim.contract.errors import NotCapturable
from shim.criu import images, openfiles
from shim.gate import volumes
from shim.gate.volumes import VolumeFile
from shim.source.opened import GONE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from shim.criu.openfiles import NamedFile
    from shim.source.opened import Opened
    from shim.source.source import Source


def volume_files(
    source: Source, directory: Path, opened: Iterable[Opened], has: int
) -> dict[str, object]:
    """Returns the fact, as a plain object.

    directory: CRIU's images. opened: all that the processes had open. has: the capabilities that
    the container's spec reaches. Raises NotCapturable for a file that the container's own
    credentials could not open; DamagedImage, OSError.
    """
    seen: dict[str, list[Opened]] = {}
    for each in opened:
        seen.setdefault(each.name, []).append(each)
    files, done = [], set()
    remaps = images.link_remaps(directory)
    links = {f"/{remap.link}" for remap in remaps}
    # Each open file has an entry of its own, and a remap of its own if its name is gone.
    by_name = Counter(named.path for named in openfiles.named_files(directory))
    ghosts = [each.path for each in images.ghosts(directory)]
    by_name.subtract(ghosts)
    by_name.subtract(f"/{remap.original}" for remap in remaps)
    for named in openfiles.named_files(directory):
        if named.path in links or not volumes.is_in(source.spec, named.path):
            continue
        for found in _found(source, named.path, seen, by_name[named.path] > 0):
            _check_power(source, named, found[0], has)
            if (key := (named.path, found[0].name)) not in done:
                done.add(key)
                files.append(_record(named.path, found).as_json())
    sockets_in = [
        path for path in images.socket_directories(directory) if volumes.is_in(source.spec, path)
    ]
    made = sorted({path for path in ghosts if volumes.is_in(source.spec, path)})
    return {"files": files, "made": made, "sockets_in": sockets_in}


def _check_power(source: Source, named: NamedFile, found: Opened, has: int) -> None:
    writes = named.flags & os.O_ACCMODE != os.O_RDONLY
    if not volumes.may_open(source.spec, has, found.status, write=writes):
        raise _refused(
            source, f"{named.path}, of a volume, is open, and the container's user could not "
            f"open it: it belongs to {found.status.st_uid}:{found.status.st_gid} with "
            f"mode {found.status.st_mode:o}",
        )  # fmt: skip


def _found(
    source: Source, path: str, seen: Mapping[str, list[Opened]], has_name: bool
) -> list[list[Opened]]:
    """The file that has this name, and the one that had it. has_name: CRIU opens it by that."""
    found = [seen[name] for name in (path, f"{path}{GONE}") if name in seen]
    if not found or (has_name and path not in seen):
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
        "cannot capture", about=source.container, why=why,
        do="Close it before the container is ready.",
    )  # fmt: skip
