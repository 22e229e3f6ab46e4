"""The messages of a page server to the swap. Lean."""

from __future__ import annotations

READY = b"r"
"""The page server holds the userfaultfd of every process."""
FILLED = b"="
"""All private memory is there. Sent only while the swap has not let the server go."""
ORDINARY = b"o"
"""All areas are ordinary memory: no change of the address space waits for the server any more."""
DAMAGED, FAILED = b"d", b"f"
"""The server ends; the reason follows. DAMAGED: the snapshot differs from the captured state.
FAILED: any other error."""
MOST_BYTES = 4096
