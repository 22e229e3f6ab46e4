"""What CRIU is told beside runc's own flags, through the `org.criu.config` annotation.

One file for one container, read by CRIU at its capture and at its restore. Source: criu(8).
"""

from __future__ import annotations

import os

ANNOTATION = "org.criu.config"
"""On the container's OCI spec: path of the file. Source: runc's docs/checkpoint-restore.md."""

_OPTIONS = (
    # Connections belong to the pod that was captured: they are restored closed, and while the
    # source is frozen nothing must be blocked.
    "tcp-close",
    "skip-in-flight",
    "network-lock skip",
    # Deleted files that are still open or mapped travel in the images; 1 MiB is CRIU's limit.
    "ghost-limit 1073741824",
    # Deleted names of files that have other names (glibc's sem_open makes them).
    "link-remap",
    "file-locks",
    "ext-unix-sk",
)


def write(path: str) -> None:
    """Write the file for one container. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write("".join(f"{option}\n" for option in _OPTIONS))
