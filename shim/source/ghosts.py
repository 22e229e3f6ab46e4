"""Refuses deleted files that CRIU would make again where other containers can write.

CRIU makes a file that is open and has no name again under a name beside its last one, opens that,
and removes it. It does so as root, by paths, in a mount namespace whose root is the node's. In a
volume or in /dev/shm another container of the pod can put a link in the place of a directory on
the way: the file would be made in a directory of the node's, with a content, an owner and a mode of
the pod's choice. And CRIU sets the mode by name, which follows links, where it is not the one that
the file was made with. So there such a file must be a regular one, directly in the mount, with a
mode that needs no second call. And as another one can be put in its place, which has another mode,
and then a link, the pod may have no other container at the restore (see `shim.restore.opened`): the
mount must be the pod's own, its /dev/shm or an emptyDir. Sources: CRIU, criu/files-reg.c,
create_ghost; criu/util.c, cr_fchpermat.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from shim.contract.errors import NotCapturable
from shim.criu import images

if TYPE_CHECKING:
    from pathlib import Path

    from shim.criu.images import Ghost
    from shim.source.source import Source

_SHM, _OF_THE_POD = "/dev/shm", "/volumes/kubernetes.io~empty-dir/"
_NEEDS_CHMOD = 0o7022
"""Mode bits that the umask of the restore (see `shim.criu.restore`) or a new owner clears."""


def check(source: Source, criu: Path) -> None:
    """Raises NotCapturable if the dump in `criu` has such a file; DamagedImage, OSError."""
    places = sorted(
        ((each.destination, each.source) for each in source.spec.mounts if each.is_bind),
        key=lambda place: len(place[0]),
    )
    for ghost in images.ghosts(criu):
        within = [place for place in places if ghost.path.startswith(f"{place[0]}/")]
        if within and (why := _danger(ghost, *within[-1])):
            raise NotCapturable(
                "cannot capture a deleted file", about=source.container,
                why=f"{ghost.path} is open without a name, in a mount that other containers may "
                f"write to, and {why}",
                do="Close the file before the container is ready, or have it outside of volumes "
                "and /dev/shm.",
            )  # fmt: skip


def _danger(ghost: Ghost, place: str, source: str) -> str:
    if place != _SHM and _OF_THE_POD not in source:
        return f"{place} can be another pod's, too"
    if "/" in ghost.path[len(place) + 1 :]:
        return f"in a directory below {place}"
    if not stat.S_ISREG(ghost.mode):
        return "not a regular file"
    if ghost.mode & _NEEDS_CHMOD:
        return f"its mode {stat.S_IMODE(ghost.mode):04o} has bits of {_NEEDS_CHMOD:04o}"
    return ""
