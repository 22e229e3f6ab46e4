"""Keys for tests: a node's directory with its own key, and trust in everything for tests of other
parts.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from shim.trust import change
from shim.trust.keys import KeyDirectory
from shim.trust.verdict import VALID, Trust, Verdict

if TYPE_CHECKING:
    from pathlib import Path

    from shim.contract.manifest import Manifest


class TrustsAll(Trust):
    """As if every snapshot were signed by this node."""

    def __init__(self) -> None:
        super().__init__(KeyDirectory("/nonexistent"), lambda _snapshot: b"")

    def verdict(self, found: Manifest) -> Verdict:
        return Verdict(VALID, "0" * 32, "this node")

    def check_signing(self, container: str) -> None:
        return


def keys_in(directory: Path) -> KeyDirectory:
    """Makes a node's keys directory, with its own key. Files of the test's user count."""
    keys = KeyDirectory(str(directory), uid=os.geteuid())
    change.initialise(keys)
    return keys
