"""Types of the ids that must not be mixed up, and what a valid one looks like.

Import the types under `TYPE_CHECKING` on the swap path: `typing` costs 9 ms there.
"""

from __future__ import annotations

import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NewType

    ContainerId = NewType("ContainerId", str)
    SnapshotId = NewType("SnapshotId", str)  # 64 hex digits; people write sha256:…
    HostPid = NewType("HostPid", int)  # as the daemon sees it
    GuestPid = NewType("GuestPid", int)  # as the workload and CRIU's images see it
else:
    ContainerId = SnapshotId = str
    HostPid = GuestPid = int

_CONTAINER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_SNAPSHOT_ID = re.compile(r"[0-9a-f]{64}")
_SNAPSHOT_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")


def is_container_id(text: str) -> bool:
    """Whether `text` can be a container id, and so a file name. containerd's rule is as strict."""
    return _CONTAINER_ID.fullmatch(text) is not None


def is_snapshot_id(text: str) -> bool:
    """Whether `text` is the 64 hexadecimal digits of a snapshot id."""
    return _SNAPSHOT_ID.fullmatch(text) is not None


def is_snapshot_name(text: str) -> bool:
    """Whether `text` can be a name in an annotation: lower case, digits, `.`, `_`, `-`, 63 long."""
    return _SNAPSHOT_NAME.fullmatch(text) is not None
