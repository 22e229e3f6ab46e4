"""Reads the store on the disk while the daemon is away. Never writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shim.store.store import Store
from shim.trust.keys import KeyDirectory
from shim.trust.verdict import Trust

if TYPE_CHECKING:
    from shim.cli.output import Output
    from shim.contract.errors import DaemonAway


def store(out: Output, away: DaemonAway) -> Store:
    """Returns the index, and notes why we read it here. Raises `away` when it is not readable."""
    found = Store()
    try:
        found.read_index()
    except FileNotFoundError:
        pass  # a node that never made a snapshot has an empty list
    except OSError as error:
        away.add_note(f"The store cannot be read, either: {error}")
        raise away from error
    out.note(f"quickthawd does not answer ({away.why}); read from the store itself")
    return found


def trust(found: Store) -> Trust:
    """Returns the trust by the keys of this node."""
    return Trust(KeyDirectory(), found.signature_of)
