"""The messages between a page server, the swap, the guard and the filler. Lean."""

from __future__ import annotations

MOST_BYTES = 4096

# The page server to the swap
READY = b"r"
"""The page server holds the userfaultfd of every process."""
FILLED = b"="
"""All private memory is there. Sent only while the swap has not let the server go."""
ORDINARY = b"o"
"""All areas are ordinary memory: no change of the address space waits for the server any more."""
CUT = b"c"
"""CRIU ended before it was done. The server waits for the swap, which knows why CRIU ended."""
DAMAGED, FAILED = b"d", b"f"
"""The sender ends; the reason follows. DAMAGED: the snapshot differs from the captured state.
FAILED: any other error. The filler sends them to the page server, too."""
PROGRESS = READY + FILLED + ORDINARY + CUT
"""Messages of a byte each, after which the server goes on."""

# The swap to the page server
KEEP = b"+"
"""The swap worked: complete the memory, whatever happens to the swap."""

# The filler of shared memory to the page server
ALL_ASKED = b"+"
"""The filler has filled all objects, and is about to let CRIU go on."""
LEFT = b"l"
"""The process of CRIU that asked has ended: nobody waits for the filler any more."""

# The page server to its guard
HOLD = b"+"
"""Hold the userfaultfd that comes with the message."""
COMPLETE = b"="
"""Nothing is missing: from now on the container survives the server."""
DISMISSED = b"."
"""End: all is filled, or no container is left to be filled."""
