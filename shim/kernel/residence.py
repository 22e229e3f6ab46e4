"""Tells how much memory processes have in use. Source: proc_pid_statm(5)."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_bytes(pids: Iterable[int]) -> int:
    """Returns the bytes in memory of these processes together, shared ones counted once a process.

    A process that has ended has none.
    """
    found = 0
    for pid in pids:
        missing = contextlib.suppress(FileNotFoundError, ProcessLookupError)
        with missing, open(f"/proc/{pid}/statm", "rb") as file:
            found += int(file.read().split()[1]) * _PAGE
    return found
