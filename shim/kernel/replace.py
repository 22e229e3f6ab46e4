"""Small files that are there as a whole or not at all, and that nobody misses after a boot. Lean.

See `shim.store.durable` for those that must survive a power cut.
"""

from __future__ import annotations

import contextlib
import os


def put(path: str, text: str) -> None:
    """Have `text` in a file of root's alone, put in place with one rename.

    Raises OSError; then the file is as it was, and nothing else is left.
    """
    directory, _, name = path.rpartition("/")
    fresh = f"{directory}/.{name}.{os.getpid()}"
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)
        os.rename(fresh, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        raise


def take_away(path: str) -> None:
    """Remove the file; it is no error when there is none, or not yet. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
