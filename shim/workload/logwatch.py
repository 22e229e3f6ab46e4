"""Waits for a line of a container's log that a regular expression matches. A separate program.

    python3 -ISE logwatch.py PARENT SECONDS EXPRESSION PATH

A pod's author controls the line and the expression, and Python's `re` holds the interpreter's lock
while it matches: on the author's own line a harmless expression such as `a*a*a*b` takes hours. In
the daemon a match would stop the node's captures and decisions; here a match has a minute of the
processor's time, at low priority. Ends with 0 if there is such a line. Imports only the standard
library, and nothing of ours.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import signal
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

CPU_S = 60
"""The kernel's limit for the program."""
_MEMORY_BYTES = 1 << 29
_NICE = 10
_OOM_SCORE = b"500"
_EVERY_S = 0.1
_LINE_BYTES = 4096
"""The bytes of a line to look at."""
_PR_SET_PDEATHSIG = 1


class Log:
    """Reads a container's log file on from the last place. kubelet may rotate the file."""

    def __init__(self, path: str) -> None:
        self._path, self._seen, self._inode = path, 0, 0

    def new_lines(self) -> Iterator[str]:
        """Yields the text of each whole line since the last call. Raises OSError."""
        with contextlib.suppress(FileNotFoundError), open(self._path, "rb") as file:
            if (inode := os.fstat(file.fileno()).st_ino) != self._inode:
                self._seen, self._inode = 0, inode
            file.seek(self._seen)
            while line := file.readline(_LINE_BYTES):
                if not line.endswith(b"\n") and len(line) < _LINE_BYTES:
                    return  # still being written
                self._seen += len(line)
                yield _message(line)


def _message(line: bytes) -> str:
    """Returns the text of a line of a CRI log: `TIME STREAM TAG TEXT`."""
    return line.decode(errors="replace").rstrip("\n").split(" ", 3)[-1]


def _be_harmless(parent: int) -> None:
    """End with the daemon, also if the daemon is killed, and first when memory is short."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)
    with open("/proc/self/oom_score_adj", "wb", buffering=0) as file:
        file.write(_OOM_SCORE)
    os.nice(_NICE)
    for kind, limit in (
        (resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, _MEMORY_BYTES),
        (resource.RLIMIT_CPU, CPU_S),
    ):  # fmt: skip
        resource.setrlimit(kind, (limit, limit))


def main() -> int:
    """Returns an exit status."""
    parent, seconds, expression, path = sys.argv[1:]
    _be_harmless(int(parent))
    signal.setitimer(signal.ITIMER_REAL, float(seconds))  # also if the daemon hangs
    pattern, log = re.compile(expression), Log(path)
    while not any(pattern.search(text) for text in log.new_lines()):
        time.sleep(_EVERY_S)  # a log grows all the time: notifications would cost more
    return 0


if __name__ == "__main__":
    sys.exit(main())
