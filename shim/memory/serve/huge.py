"""Makes huge pages where the captured process had asked for them.

A page server installs small pages. CRIU restores the advice of the process (MADV_HUGEPAGE), and
khugepaged would collapse the areas in its own time; here we collapse them at once, when the areas
are complete and belong to no userfaultfd any more. Best effort: an area that the kernel does not
collapse stays as it is. Source: madvise(2), process_madvise(2). Lean.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

from shim.kernel import survivors
from shim.kernel.hugepages import HUGE_BYTES
from shim.kernel.libc import MADV_COLLAPSE, NR_PROCESS_MADVISE, syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from shim.memory.layout import SpaceLayout

_AT_ONCE_BYTES = 32 << 20
"""Collapsed in a call, which holds the lock of the address space now and then."""


def collapse(container: str, spaces: Iterable[SpaceLayout]) -> None:
    """Make huge pages in the areas of all processes that wanted them. Never raises OSError."""
    for space in spaces:
        if space.huge:
            with contextlib.suppress(OSError):
                _collapse(survivors.numbered(container, space.pid), space.huge)


def _collapse(pid: int, areas: Sequence[tuple[int, int]]) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        for start, end in areas:
            at = -(-start // HUGE_BYTES) * HUGE_BYTES
            while at + HUGE_BYTES <= end:
                size = min(_AT_ONCE_BYTES, (end - at) // HUGE_BYTES * HUGE_BYTES)
                piece = (ctypes.c_uint64 * 2)(at, size)
                with contextlib.suppress(OSError):  # unmapped meanwhile, or no huge page is free
                    syscall(NR_PROCESS_MADVISE, pidfd, piece, 1, MADV_COLLAPSE, 0)
                at += size
    finally:
        os.close(pidfd)
