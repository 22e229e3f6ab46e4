"""Decides whether a container may start from one of several snapshots. Pure.

A refusal is a value with every difference, not only the first. The daemon decides with `decide`
from containerd's record of a container; `quickthaw-runc` has the spec for the runtime, and has the
last word with `refusals_of` and the rows of SWAP. Lean.
"""

from __future__ import annotations

from shim.gate.checks import DECISION, findings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from shim.contract.manifest import Manifest
    from shim.contract.names import SnapshotId
    from shim.gate.refusal import Finding
    from shim.gate.request import Request


_TOLD_AT_MOST = 8
"""Refusals with their values in a line; of further refusals only the codes."""


class Match:
    """The snapshot to start from."""

    __slots__ = ("manifest",)

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest


class Refused:
    """There are candidates, but none fits. refusals: all differences from the newest candidate."""

    __slots__ = ("refusals", "snapshot")

    def __init__(self, snapshot: SnapshotId, refusals: Sequence[Finding]) -> None:
        self.snapshot, self.refusals = snapshot, tuple(refusals)

    @property
    def codes(self) -> list[str]:
        """Returns the codes of the checks that refused."""
        return [refusal.code for refusal in self.refusals]

    def __str__(self) -> str:
        told = "; ".join(map(str, self.refusals[:_TOLD_AT_MOST]))
        more = ", ".join(self.codes[_TOLD_AT_MOST:])
        return f"snapshot {self.snapshot[:12]} does not fit: {told}{more and f'; also {more}'}"


class NoSnapshot:
    """There is no candidate at all."""

    __slots__ = ()


def decide(request: Request, candidates: Iterable[Manifest]) -> Match | Refused | NoSnapshot:
    """Returns the first of `candidates` (newest first) that fits.

    The candidates are the snapshots that the pod named, or the snapshots with its match key.
    """
    newest: Refused | None = None
    for manifest in candidates:
        if not (refusals := refusals_of(manifest, request)):
            return Match(manifest)
        newest = newest or Refused(manifest.id, refusals)
    return newest or NoSnapshot()


def refusals_of(manifest: Manifest, request: Request, when: str = DECISION) -> list[Finding]:
    """Returns every reason against this snapshot; empty when it fits. when: see `checks`."""
    return [found for found in findings(manifest, request, when) if not found.fits]
