"""Reads the powers that a pod's network namespace gives everybody: ports and pings.

Two sysctls give them without any capability. A pod's author or the runtime sets both for the
sandbox, so that no container's spec has them. A captured process may have relied on them. Lean.
"""

from __future__ import annotations

import contextlib

from shim.kernel.netns import entered

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from shim.oci.spec import Spec

FIRST_PORT = "net.ipv4.ip_unprivileged_port_start"
PING_GROUPS = "net.ipv4.ping_group_range"
_FIRST_PORT = 1024


def open_to_all(sysctls: Mapping[str, str]) -> tuple[int, bool]:
    """Returns the lowest port that everybody may bind, and whether somebody may ping.

    Raises ValueError for values that the kernel does not write.
    """
    low, high = (sysctls.get(PING_GROUPS) or "1 0").split()
    return int(sysctls.get(FIRST_PORT) or _FIRST_PORT), int(low) <= int(high)


def open_in_sandbox(spec: Spec) -> tuple[int, bool]:
    """Returns the same for the namespace that a container joins. Raises OSError, ValueError."""
    path = spec.namespace("network")
    place = entered(path) if path else contextlib.nullcontext()
    with place:
        return open_to_all({name: _read(name) for name in (FIRST_PORT, PING_GROUPS)})


def _read(name: str) -> str:
    with open(f"/proc/sys/{name.replace('.', '/')}") as file:
        return file.read().strip()
