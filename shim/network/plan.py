"""Plans the work of the prestart hook in the pod's network namespace. Lean.

The swap writes the plan if there is work: bring up `lo`, or make addresses bindable that restored
sockets have and the new pod has not. `hook.prestart` reads the plan.
"""

from __future__ import annotations

import contextlib
import os
import time

from shim.contract import jsontext
from shim.contract.paths import CONTAINER_NETWORK_PLAN, CONTAINERS, HOOK
from shim.kernel import process
from shim.kernel.alarm import TooLate
from shim.kernel.netns import identity
from shim.kernel.replace import take_away

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from shim.kernel.fds import OwnedFd

_TAKE_BACK_S = 5.0


def path_of(container: str) -> str:
    """Returns the path of the plan. hook/quickthaw-hook knows the path, too."""
    return f"{CONTAINERS}/{container}/{CONTAINER_NETWORK_PLAN}"


def write(
    container: str, network: OwnedFd, bindable: Sequence[str], undo: contextlib.ExitStack
) -> None:
    """Write the plan: bring up `lo`, and make the addresses `bindable`. Raises OSError.

    network: the namespace, open until `undo` has run, which takes the plan and the addresses back.
    """
    plan = path_of(container)
    undo.callback(take_away, plan)  # a cold start runs the hook, too, and needs none of it
    if bindable:
        undo.callback(_take_addresses_back, container, network)
    with open(plan, "w") as file:
        known = identity(f"/proc/self/fd/{network.fileno()}")
        file.write(jsontext.compose({"bindable": list(bindable), "netns": known}))


def read(container: str) -> tuple[list[str], list[int]]:
    """Returns the bindable addresses, and the namespace's identity. Raises OSError, ValueError."""
    with open(path_of(container)) as file:
        plan = jsontext.parse(file.read())
    return plan["bindable"], plan["netns"]


def _take_addresses_back(container: str, network: OwnedFd) -> None:
    """Undo the hook's changes to `lo`. The runtime's poststop hook keeps off while we go on."""
    netns = f"/proc/self/fd/{network.fileno()}"
    argv = [HOOK, "undo", container, netns]
    with contextlib.suppress(TooLate):  # the hook at the container's end tries again
        process.run(
            argv, until=time.monotonic() + _TAKE_BACK_S, quiet=True,
            first=lambda: os.set_inheritable(network.fileno(), True),
        )  # fmt: skip
