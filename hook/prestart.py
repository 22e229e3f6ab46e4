"""prestart: what a restored process must find in its network namespace.

runc runs the hook at CRIU's setup-namespaces point: the captured network is made bearable, with
`lo` up, and addresses bindable that restored sockets have and this pod has not. At a cold start
there is nothing to do.
"""

from __future__ import annotations

import json
import os

from shim.contract import journal
from shim.contract.paths import CONTAINER_BINDABLE, CONTAINERS, SWAPPED
from shim.kernel.netns import enter, loopback_is_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hook.state import State


def prestart(state: State) -> None:
    """Raises only at a restore; the swap then falls back to a cold start."""
    if os.path.exists(f"{SWAPPED}/{state.container}"):
        _prepare(f"{CONTAINERS}/{state.container}", f"/proc/{state.pid}/ns/net")


def _prepare(private: str, netns: str) -> None:
    wanted: list[str] = []
    if os.path.exists(f"{private}/{CONTAINER_BINDABLE}"):
        with open(f"{private}/{CONTAINER_BINDABLE}") as file:
            wanted = json.load(file)
    loopback_up = loopback_is_up(netns)
    if loopback_up and not wanted:
        return  # the usual case: pyroute2 is not even imported
    from hook import netlink

    path = f"{private}/journal"
    for address in wanted:
        journal.note(path, journal.ADDRESS, address)
    enter(netns)
    netlink.bring_up_loopback()
    for address in wanted:
        netlink.add_to_loopback(address)
