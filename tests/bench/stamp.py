"""Times commands of a node from within the node: entering the node takes time of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.node.enclosure import Enclosure

_STAMPING: Final = """\
import os, sys, time
began = time.monotonic()
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(f"\\n{began} {time.monotonic()}")
sys.exit(status)
"""


class Stamped(NamedTuple):
    """A command's output and times. called_s: by CLOCK_MONOTONIC, as time.perf_counter()."""

    out: str
    called_s: float
    took_s: float


def stamped(
    node: Enclosure,
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 600,
) -> Stamped:
    """Run a command in the node. Raises CommandFailed."""
    stamping = ["python3", "-IS", "-c", _STAMPING, *command]
    printed = node.run(stamping, timeout_s=timeout_s, environment=environment)
    out, _, line = printed.rstrip("\n").rpartition("\n")
    began, ended = map(float, line.split())
    return Stamped(out, began, ended - began)
