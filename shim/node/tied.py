"""Becomes another program, which ends with the daemon. A separate program.

    tied.py PARENT PROGRAM ARGUMENT…

For programs that the daemon runs on behalf of a pod's author and that cannot look after themselves,
such as `runc exec`. A killed daemon cannot end such a program, and the program must not have the
daemon's place on the OOM killer's list.
"""

from __future__ import annotations

import os
import sys

from shim.kernel import priority


def main() -> int:
    """Execute the program. Returns only if that fails."""
    parent, *argv = sys.argv[1:]
    priority.be_a_helper_of(int(parent))
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        sys.stdout.write(f"{argv[0]}: {error.strerror}\n")
    return 127
