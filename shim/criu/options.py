"""Writes CRIU's options beside runc's own flags, for the `org.criu.config` annotation.

A file for each container, which CRIU reads at its capture and at its restore. Source: criu(8).
"""

from __future__ import annotations

import contextlib
import os

from shim.contract.paths import CONTAINER_CRIU_CONF, CONTAINERS, OPENED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

ANNOTATION = "org.criu.config"
"""The annotation on the container's OCI spec: path of the file. Source: runc's
docs/checkpoint-restore.md."""


def path_of(container: str) -> str:
    """Returns the path of a container's file: the only file that the annotation may name."""
    return f"{CONTAINERS}/{container}/{CONTAINER_CRIU_CONF}"


_OPTIONS = (
    # Connections belong to the pod that was captured: they are restored closed.
    "tcp-close",
    "skip-in-flight",
    # Deleted files that are still open or mapped travel in the images; 1 MiB is CRIU's limit.
    "ghost-limit 1073741824",
    # Deleted names of files that have other names (glibc's sem_open makes them).
    "link-remap",
    "file-locks",
    "ext-unix-sk",
)


# CRIU up to 4.1 crashes when it finds this option in the file that RPC names: it then compares the
# (absent) command line with "restore". A restore takes the method from the images.
_DUMP_OPTIONS = (
    # The pod's network is shared with other containers, and we keep no connection: while the source
    # is frozen, nothing may be blocked, and iptables must not run.
    "network-lock skip",
)


# With an earlier dump CRIU compares page by page, and would log a line for each page. In this form
# only: the value of this option is optional.
_BRIEF_OPTIONS = ("verbosity=2",)


# CRIU runs this at each step of a restore, beside its notices to runc: see `shim.restore.opened`.
_ASKING_OPTIONS = (f"action-script {OPENED}",)


def write(
    path: str,
    *,
    is_brief: bool = False,
    is_asking: bool = False,
    sources: Mapping[str, str] | None = None,
) -> None:
    """Write the file for a container. Raises OSError.

    is_brief: CRIU's log gets no notes. is_asking: a restore asks us to check its open files.
    sources: directories that CRIU binds instead of the runtime's choice, by place.
    """
    brief, asking = _BRIEF_OPTIONS if is_brief else (), _ASKING_OPTIONS if is_asking else ()
    binds = [f"external mnt[{place}]:{source}" for place, source in (sources or {}).items()]
    _write(path, (*_OPTIONS, *brief, *asking, *binds))


def is_brief(path: str) -> bool:
    """Whether this file was written with `is_brief`."""
    with contextlib.suppress(FileNotFoundError), open(path) as file:
        return _BRIEF_OPTIONS[0] in file.read().splitlines()
    return False


def write_for_dump(path: str) -> dict[str, str]:
    """Write the options for the dump only. Returns variables for its environment. Raises OSError.

    Source: criu(8), CRIU_CONFIG_FILE. Options that runc sets over RPC have precedence.
    """
    _write(path, _DUMP_OPTIONS)
    return {"CRIU_CONFIG_FILE": path}


def _write(path: str, options: tuple[str, ...]) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write("".join(f"{option}\n" for option in options))
