"""Compares a snapshot with a container in full, for people and programs. Pure.

This applies the rows of the decision, and reports equal values, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shim.gate.checks import BOTH, CHECKS, DECISION
from shim.gate.decide import refusals_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shim.contract.manifest import Manifest
    from shim.gate.request import Request


def explained(found: Manifest, request: Request) -> dict[str, Any]:
    """Returns every check of the decision with both values, and whether the snapshot fits."""
    rows = [row for row in CHECKS if row.when in (DECISION, BOTH)]
    checks = [
        {**row.compare(found, request).as_json(), "compares": row.compares, "when": row.when}
        for row in rows
    ]
    refused = [check["code"] for check in checks if not check["fits"]]
    return {
        "snapshot": found.id, "name": found.name, "created": found.created,
        "source": {"namespace": found.source.namespace, "pod": found.source.pod},
        "fits": not refused, "refused": refused, "checks": checks,
    }  # fmt: skip


def nothing() -> dict[str, Any]:
    """The same where there is no snapshot to compare with."""
    return {
        "snapshot": "", "name": "", "created": "", "source": {"namespace": "", "pod": ""},
        "fits": False, "refused": [], "checks": [],
    }  # fmt: skip


def nearest(request: Request, candidates: Iterable[Manifest]) -> Manifest | None:
    """Returns the candidate with the fewest refusals; of several the first."""
    return min(candidates, key=lambda found: len(refusals_of(found, request)), default=None)
