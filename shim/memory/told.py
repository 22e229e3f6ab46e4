"""What a page server tells the swap. Lean."""

from __future__ import annotations

READY = b"r"
"""It has all that CRIU sends."""
FILLED = b"="
"""All private memory is there. Told only while the swap has not let it go."""
DAMAGED, FAILED = b"d", b"f"
"""Why it ends follows: the snapshot is not what was captured, or something else is wrong."""
MOST_BYTES = 4096
