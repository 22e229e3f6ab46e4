"""Damages files as a disk does: a single bit, and nothing else of the file changes."""

import os
from pathlib import Path


def flip_bit(path: Path, at: int | None = None) -> None:
    """Change a bit of the file, in the middle or in the byte `at`. Its size and times stay."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(status.st_size // 2 if at is None else at)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
