"""Paths into volumes on which a link lies: what CRIU must not open.

CRIU opens the files that a captured process had open by their paths, with all its own power, in
the new container. What is in a volume may have been changed since: with a link in the place of its
own file a process would get one that it may not open itself. CRIU records paths without links, so
that there is none on the way to a file which is as it was. Who may write the volume at the very
moment of the restore can still win a race with this look. Lean.
"""

from __future__ import annotations

import errno
import os

from shim.gate.facts import entries, is_bind
from shim.kernel.beneath import open_beneath, open_dir

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

_LINK = (errno.ELOOP, errno.EXDEV)


def linked(spec: Mapping[str, Any], paths: Sequence[str]) -> list[str]:
    """Those of `paths`, of the container, that lead over a link in a volume of this spec."""
    places = sorted(
        (
            (os.path.normpath(str(mount.get("destination"))),
             str(mount.get("source") or "") if is_bind(mount) else "")
            for mount in entries(spec, "mounts")
        ),
        key=lambda place: -len(place[0]),
    )  # fmt: skip
    return [path for path in paths if _is_linked(path, places)]


def in_volumes(spec: Mapping[str, Any], paths: Sequence[str]) -> list[str]:
    """Those of `paths` that are in a mount of this spec, each once and in order."""
    places = [os.path.normpath(str(mount.get("destination"))) for mount in entries(spec, "mounts")]
    found = {path for path in paths if any(path.startswith(f"{place}/") for place in places)}
    return sorted(found)


def _is_linked(path: str, places: Sequence[tuple[str, str]]) -> bool:
    for destination, source in places:
        if path.startswith(f"{destination}/"):
            return bool(source) and _leads_astray(source, path[len(destination) + 1 :])
    return False


def _leads_astray(source: str, path: str) -> bool:
    try:
        with open_dir(source) as volume, open_beneath(volume.fileno(), path, os.O_PATH):
            return False
    except OSError as error:
        return error.errno in _LINK  # what is gone CRIU cannot open, and then it says so
