"""Runs the real runtime, with the caller's own arguments, environment, descriptors and signals."""

from __future__ import annotations

import os
import signal

from shim.contract.paths import RUNTIME

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def runtime() -> str:
    """Returns the path of the real OCI runtime, or its bare name for the search in PATH."""
    try:
        with open(RUNTIME) as file:
            return file.readline().strip() or "runc"
    except OSError:
        return "runc"


def become_runtime(arguments: list[str]) -> NoReturn:
    """Replace this process by the real runtime. Raises OSError when it cannot be executed."""
    # The interpreter ignores these signals from its start on, and exec would pass that on.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    program = runtime()
    os.execvp(program, [program, *arguments])
