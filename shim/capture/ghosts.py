"""Refuses deleted files that CRIU would make again where other containers can write.

For an open file without a name, CRIU makes a file under a name beside the last name, opens it, and
removes it. CRIU does so as root, by paths, in a mount namespace whose root is the node's. In a
volume or in /dev/shm another container of the pod can put a link in the place of a directory on the
way: then CRIU would make the file in a directory of the node, with a content, an owner and a mode
of the pod's choice. And if the mode differs from the mode at creation, CRIU sets the mode by name,
and so follows links. So such a file must be a regular file, directly in the mount, with a mode that
needs no second call. Sources: CRIU, criu/files-reg.c, create_ghost; criu/util.c, cr_fchpermat.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from shim.contract.errors import NotCapturable
from shim.criu import images
from shim.gate.facts import entries, is_bind

if TYPE_CHECKING:
    from pathlib import Path

    from shim.capture.source import Source
    from shim.criu.images import Ghost

_NEEDS_CHMOD = 0o7022
"""Mode bits that the umask of the restore (see `shim.criu.restore`) or a new owner clears."""


def check(source: Source, criu: Path) -> None:
    """Raises NotCapturable if the dump in `criu` has such a file; DamagedImage, OSError."""
    mounts = [each for each in entries(source.spec, "mounts") if is_bind(each)]
    places = sorted((os.path.normpath(str(each.get("destination"))) for each in mounts), key=len)
    for ghost in images.ghosts(criu):
        within = [place for place in places if ghost.path.startswith(f"{place}/")]
        if within and (why := _danger(ghost, within[-1])):
            raise NotCapturable(
                "cannot capture a deleted file", container=source.container,
                why=f"{ghost.path} is open without a name, in a mount that other containers may "
                f"write to, and {why}",
                do="Close the file before the container is ready, or have it outside of volumes "
                "and /dev/shm.",
            )  # fmt: skip


def _danger(ghost: Ghost, place: str) -> str:
    if "/" in ghost.path[len(place) + 1 :]:
        return f"in a directory below {place}"
    if not stat.S_ISREG(ghost.mode):
        return "not a regular file"
    if ghost.mode & _NEEDS_CHMOD:
        return f"its mode {stat.S_IMODE(ghost.mode):04o} has bits of {_NEEDS_CHMOD:04o}"
    return ""
