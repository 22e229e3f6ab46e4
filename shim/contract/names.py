"""Types of the ids that must not be mixed up, and checks of their syntax.

Import the types under `TYPE_CHECKING` on the swap path: `typing` costs 9 ms there, and `re` 5 ms.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NewType

    ContainerId = NewType("ContainerId", str)
    SnapshotId = NewType("SnapshotId", str)  # 64 hex digits; people write sha256:…
else:
    ContainerId = SnapshotId = str

_DIGITS, _LOWER = "0123456789", "abcdefghijklmnopqrstuvwxyz"
_IN_ID = frozenset(f"{_DIGITS}{_LOWER}{_LOWER.upper()}_.-")
_IN_NAME = frozenset(f"{_DIGITS}{_LOWER}_.-")
_HEX = frozenset(f"{_DIGITS}abcdef")


def is_container_id(text: str) -> bool:
    """Whether `text` can be a container id, hence a file name. containerd is equally strict."""
    return 0 < len(text) <= 128 and _IN_ID.issuperset(text) and text[0] not in "_.-"


def is_snapshot_id(text: str) -> bool:
    """Whether `text` is the 64 hexadecimal digits of a snapshot id."""
    return len(text) == 64 and _HEX.issuperset(text)


def is_snapshot_name(text: str) -> bool:
    """Whether `text` can be a name in an annotation: lower case, digits, `.`, `_`, `-`, 63 long."""
    fits = 0 < len(text) <= 63 and _IN_NAME.issuperset(text)
    return fits and text[0] not in "_.-" and text[-1] not in "_.-"
