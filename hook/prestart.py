"""Prepares the network namespace of a restored process, as prestart hook.

runc runs the hook at CRIU's setup-namespaces point. `quickthaw-runc` has looked at the namespace
before, and left a plan if there is work: bring up `lo`, or make addresses bindable that restored
sockets have and this pod has not. Without a plan, at cold starts and at most restores, the shell
part of this hook has ended already.
"""

from __future__ import annotations

from shim.contract import faults, journal
from shim.kernel.netns import enter
from shim.network import plan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hook.state import HookState


def prestart(state: HookState) -> None:
    """Carry out the plan. Raises OSError or ValueError; the swap then becomes a cold start."""
    bindable, netns = plan.read(state.container)
    faults.point("hook.prestart", state.container)
    from hook import netlink

    noted = journal.path_of(state.container)
    if bindable:
        journal.note(noted, journal.NETNS, netns)
    for address in bindable:
        journal.note(noted, journal.ADDRESS, address)
    # This process does nothing else: no way back needed. With the runtime killed, the number that
    # it told may be another process': only the namespace that the plan was made for is entered.
    enter(f"/proc/{state.pid}/ns/net", netns)
    netlink.bring_up_loopback()
    for address in bindable:
        netlink.add_to_loopback(address)
    faults.point("hook.prestart.done", state.container)
