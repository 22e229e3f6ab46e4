"""Makes huge pages in shared memory of ours that is empty, and that nobody else uses yet. Lean.

We make a single small page, which the kernel collapses to a huge page whose rest is zeros. That
takes half as long as 512 small pages. At times no huge page is free, or the kernel has to compact
memory for a huge page, or the host of a virtual machine to give memory back; then small pages are
quicker.
"""

from __future__ import annotations

from time import thread_time

from shim.kernel.libc import collapse, populate_write
from shim.kernel.userfault import PAGE

HUGE_BYTES = 2 << 20
_SLOW_S = 0.0005
"""Seconds of a processor."""
_AGAINST = 8
"""When this many more huge pages came slowly or not at all than quickly, no more are made."""


class HugePages:
    """Makes huge pages as long as they come quickly. Several threads may use an instance."""

    def __init__(self) -> None:
        self._against = 0

    def make(self, address: int) -> int:
        """Make a huge page at a multiple of HUGE_BYTES. Returns the bytes that are there now.

        HUGE_BYTES; less when no huge page is free; 0 when none is tried any more. Not where a
        userfaultfd is registered. Raises OSError when the kernel has no page at all.
        """
        if self._against >= _AGAINST:
            return 0
        began = thread_time()
        populate_write(address, PAGE)
        made = HUGE_BYTES
        try:
            collapse(address, HUGE_BYTES)
            is_quick = thread_time() - began < _SLOW_S
        except OSError:
            is_quick, made = False, PAGE
        self._against = max(self._against - 1, 0) if is_quick else self._against + 1
        return made


def blocks(start: int, end: int) -> range:
    """Returns the starts of whole huge pages between two addresses, or offsets in a file."""
    first = -(-start // HUGE_BYTES) * HUGE_BYTES
    return range(first, end - HUGE_BYTES + 1, HUGE_BYTES)
