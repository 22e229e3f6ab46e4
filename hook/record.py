"""record: the network of a running container, for the manifest of its capture.

Not a hook of the runtime: quickthawd runs it, because it needs pyroute2 in another network
namespace, and what was true when the container started need not be true when it is captured.
"""

from __future__ import annotations

import json
import sys

from hook import netlink
from shim.kernel.netns import enter


def record(pid: int) -> None:
    """Print the network facts of process `pid` as one JSON object. Raises OSError."""
    enter(f"/proc/{pid}/ns/net")  # this process does nothing else: no way back needed
    json.dump(netlink.facts(), sys.stdout)
