"""poststop: everything that was set up for the container is undone, even if the daemon is away."""

from __future__ import annotations

import errno
import os

from shim.contract import faults, journal
from shim.contract.paths import CONTAINERS
from shim.kernel.netns import enter
from shim.restore.forget import forget

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hook.state import HookState


def poststop(state: HookState) -> None:
    """Raises OSError or ValueError, after having done what could be done.

    The sandbox's network namespace outlives the container; addresses that we gave to it go.
    """
    if journal.is_locked(f"{CONTAINERS}/{state.container}"):
        return
    faults.point("hook.poststop", state.container)
    given = _given(state.container)
    forget(state.container)
    faults.point("hook.poststop.forgotten", state.container)
    if given[0]:
        from shim.oci.bundle import Bundle

        _take_back(*given, Bundle(state.bundle).spec.namespace("network"))


def undo(container: str, netns: str) -> None:
    """Take addresses back that a restore was given which then failed. Raises OSError.

    Not a hook of the runtime: `quickthaw-runc` calls it before the container starts cold.
    """
    _take_back(*_given(container), netns)


def _given(container: str) -> tuple[list[str], list[int]]:
    """The addresses that were given, and the identity of the namespace that has them."""
    changes = list(journal.changes(journal.path_of(container)))
    known = next((subject for kind, subject in changes if kind == journal.NETNS), None)
    return (
        [str(subject) for kind, subject in changes if kind == journal.ADDRESS],
        [int(number) for number in known] if isinstance(known, list) else [],
    )


def _take_back(addresses: list[str], known: list[int], netns: str) -> None:
    """With the namespace gone, so are its addresses: its path may be another's by now."""
    if not addresses or not os.path.exists(netns):
        return
    try:
        enter(netns, known)
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        return
    from hook import netlink

    for address in addresses:
        netlink.remove_from_loopback(address)
