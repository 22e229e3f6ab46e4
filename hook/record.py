"""record: the network of a running container, for the manifest of its capture.

Not a hook of the runtime: quickthawd runs it, because it needs pyroute2 in another network
namespace, and what was true when the container started need not be true when it is captured.
"""

from __future__ import annotations

import json
import sys

from shim.kernel import priority
from shim.kernel.namespaces import CLONE_NEWNET, setns


def record(network_fd: int, parent: int) -> None:
    """Print the facts of a network namespace as one JSON object. Raises OSError.

    network_fd: the namespace; the daemon has held it since the container's start, whose process
    may have ended. parent: the daemon, which this process does not outlive.
    """
    priority.be_a_helper_of(parent)
    setns(network_fd, CLONE_NEWNET)  # this process does nothing else: no way back needed
    from hook import netlink  # late: this takes a while, and nothing may outlive the daemon

    json.dump(netlink.facts(), sys.stdout)
