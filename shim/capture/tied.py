"""A program of its own: become another program, which ends with the daemon.

    tied.py PARENT PROGRAM ARGUMENT…

For what the daemon runs on behalf of a pod's author and cannot be told to look after itself, as
`runc exec`. A daemon that is killed cannot end it, and a daemon's place on the OOM killer's list is
not for it.
"""

from __future__ import annotations

import os
import sys

from shim.kernel import priority


def main() -> int:
    """Does not return when the program can be executed."""
    parent, *argv = sys.argv[1:]
    priority.be_a_helper_of(int(parent))
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        sys.stdout.write(f"{argv[0]}: {error.strerror}\n")
    return 127
