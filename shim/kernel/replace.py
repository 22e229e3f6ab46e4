"""Writes and removes small files, whole or not at all, that need not survive a boot. Lean.

See `shim.store.durable` for files that must survive a power cut.
"""

from __future__ import annotations

import contextlib
import os


def put(path: str, text: str) -> None:
    """Put `text` into a file that root alone can read, in place by a rename.

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
    """Remove the file; no error when it does not exist. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
