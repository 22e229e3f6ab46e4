"""Keeps CRIU's log of the last failed restore from each snapshot. Lean.

A log leaves with its snapshot (see `shim.store.store`), and all logs together have a limit: they
lie in memory, and a pod that makes restores fail must not fill the memory.
"""

from __future__ import annotations

import contextlib
import os

from shim.contract.paths import LOGS
from shim.kernel import replace

_BEGIN_BYTES = 64 << 10
_END_BYTES = 960 << 10
"""`keep` keeps the beginning and the end of a long log: the error is near the end."""
MOST_BYTES = 32 << 20
"""The limit for all logs together."""
_LEFT_OUT = b"\n[...]\n"


def keep(log: str, snapshot: str, directory: str = LOGS) -> str:
    """Copy the file `log` to a place that outlives the container. Returns the place, or empty.

    Removes the oldest logs of other snapshots if all are too large. Raises OSError.
    """
    kept = f"{directory}/{snapshot}.log"
    try:
        with open(log, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(_BEGIN_BYTES + _END_BYTES)
            if size > len(content):
                file.seek(-_END_BYTES, os.SEEK_END)
                content = content[:_BEGIN_BYTES] + _LEFT_OUT + file.read(_END_BYTES)
    except FileNotFoundError:
        return ""
    _make_room(directory, kept, MOST_BYTES - len(content))
    fd = os.open(kept, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "wb") as out:
        out.write(content)
    return kept


def _make_room(directory: str, but: str, left: int) -> None:
    found = []
    for name in os.listdir(directory):
        path = f"{directory}/{name}"
        with contextlib.suppress(FileNotFoundError):  # another restore or the daemon removed it
            status = os.lstat(path)
            found.append((status.st_mtime_ns, status.st_size, path))
    for _, size, path in sorted(found, reverse=True):
        left -= 0 if path == but else size
        if left < 0 and path != but:
            replace.take_away(path)
