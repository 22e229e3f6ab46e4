"""prestart: what a captured process found in its network, and what a restored one must find.

At a cold start the container's network is recorded, for the manifest of a capture to come. At a
restore (runc runs the hook at CRIU's setup-namespaces point) the captured network is made
bearable: `lo` up, and addresses bindable that restored sockets have and this pod has not.
A container must not fail to start cold because of us: there, whatever goes wrong is only noted.
"""

from __future__ import annotations

import json
import os

from shim.contract import journal
from shim.contract.paths import CONTAINER_BINDABLE, CONTAINER_NETWORK, CONTAINERS, SWAPPED
from shim.kernel.netns import enter, loopback_is_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hook.state import State


def prestart(state: State) -> None:
    """Raises only at a restore; the swap then falls back to a cold start."""
    private = f"{CONTAINERS}/{state.container}"
    netns = f"/proc/{state.pid}/ns/net"
    if os.path.exists(f"{SWAPPED}/{state.container}"):
        _prepare(private, netns)
        return
    try:
        _record(private, netns)
    except Exception as error:  # noqa: BLE001 - the border: a cold start goes on in any case
        with open(f"{private}/{CONTAINER_NETWORK}.error", "w") as file:
            file.write(f"{type(error).__name__}: {error}\n")


def _record(private: str, netns: str) -> None:
    from hook import netlink

    enter(netns)  # this process does nothing else: no way back needed
    facts = netlink.facts()
    with open(f"{private}/{CONTAINER_NETWORK}.new", "w") as file:
        json.dump(facts, file)
    os.rename(f"{private}/{CONTAINER_NETWORK}.new", f"{private}/{CONTAINER_NETWORK}")


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
