"""Lists the words between the daemon and the guard of a frozen container (hook/thaw). Lean."""

from __future__ import annotations

GUARD_READY = b"ready\n"
"""The guard to the daemon: the guard holds its lock, and the freeze may begin."""
GUARD_DONE = b"done\n"
"""The daemon to the guard: the window is over, and the guard may end without a thaw."""
GUARD_WITHIN = b"within "
"""The daemon to the guard, with seconds behind: the window is to end within this time from now."""
