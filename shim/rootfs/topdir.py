"""Reads and sets the attributes of a layer's top directory. Lean.

overlayfs shows the attributes of the root directory from the upperdir alone, so no layer below
shows through.
"""

from __future__ import annotations

import os
import stat

from shim.kernel.beneath import O_WALK
from shim.kernel.fds import OwnedFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypedDict

    class TopAttributes(TypedDict):
        """As JSON. owner: user and group. times_ns: access, modification. xattrs: in hex."""

        mode: int
        owner: list[int]
        times_ns: list[int]
        xattrs: dict[str, str]


_PRIVATE = ("trusted.overlay.", "user.overlay.")


def attributes(directory: str) -> TopAttributes:
    """Returns all attributes, overlayfs' own marks included. Raises OSError."""
    status = os.stat(directory)
    return {
        "mode": stat.S_IMODE(status.st_mode),
        "owner": [status.st_uid, status.st_gid],
        "times_ns": [status.st_atime_ns, status.st_mtime_ns],
        "xattrs": {name: os.getxattr(directory, name).hex() for name in os.listxattr(directory)},
    }


def seen_through(upper: TopAttributes, lower: TopAttributes) -> TopAttributes:
    """Returns the attributes that make an upperdir's root look as in `lower`.

    overlayfs' marks stay the marks of `upper`: they belong to its mount.
    """
    marks = {name: value for name, value in upper["xattrs"].items() if name.startswith(_PRIVATE)}
    shown = {n: value for n, value in lower["xattrs"].items() if not n.startswith(_PRIVATE)}
    return {**lower, "xattrs": {**shown, **marks}}


def set_attributes(directory: str, wanted: TopAttributes) -> None:
    """Give the directory exactly these attributes. Raises OSError; follows no final symlink."""
    with OwnedFd(os.open(directory, O_WALK)) as opened:
        fd = opened.fileno()
        os.chown(fd, *wanted["owner"])
        for name in os.listxattr(fd):
            if name not in wanted["xattrs"]:
                os.removexattr(fd, name)
        for name, value in wanted["xattrs"].items():
            os.setxattr(fd, name, bytes.fromhex(value))
        os.chmod(fd, wanted["mode"])  # an ACL among the xattrs changed it
        os.utime(fd, ns=(wanted["times_ns"][0], wanted["times_ns"][1]))
