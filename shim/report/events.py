"""Makes a Kubernetes event of each record that a pod's author should see."""

from __future__ import annotations

from functools import singledispatch
from typing import TYPE_CHECKING, Final, TypeAlias

from shim.contract import outcome
from shim.contract.errors import Effect
from shim.gate import volumecontent
from shim.kube.event import NORMAL, WARNING, PodEvent
from shim.report import records

if TYPE_CHECKING:
    from shim.report.records import Happened

_CONTENT: Final = (
    " volume_content: a Secret or ConfigMap volume holds other data than at the capture, which the "
    "captured process has in memory; quickthaw.io/volume-content: ignore starts from it."
)
Content: TypeAlias = tuple[str, str, str]
"""Kind, reason and message."""


def of(record: Happened) -> PodEvent | None:
    """Returns the event, None when the record is none for the author of a pod."""
    found, its = content(record), record.subject
    if found is None or its is None:
        return None
    return PodEvent(its.namespace, its.pod, its.uid, its.container, *found)


@singledispatch
def content(record: Happened) -> Content | None:
    """Returns kind, reason and message."""
    del record
    return None


@content.register
def _(record: records.AnnotationRefused) -> Content:
    return WARNING, "BadAnnotation", record.why


@content.register
def _(record: records.StartsCold) -> Content | None:
    if record.is_expected:
        return None
    text = f"{record.public or record.why}; {Effect.COLD_START}."
    return WARNING, "RestoreRefused", _does_not_fit(record) if record.codes else text


@content.register
def _(record: records.SwapEnded) -> Content | None:
    if record.result == outcome.RESTORED:
        text = f"restored from snapshot {record.short} in {record.seconds:.3f} s"
        return (NORMAL, "Restored", text) if record.is_seen else None
    if not record.is_seen and not record.why:
        return None
    return WARNING, record.reason, _does_not_fit(record) if record.codes else record.why


@content.register
def _(record: records.Quarantined) -> Content:
    text = f"snapshot {record.short} goes to quarantine, pods start cold"
    return WARNING, "SnapshotQuarantined", f"{text}: {record.public or record.why}"


@content.register
def _(record: records.CaptureRefused) -> Content:
    return WARNING, "NotCaptured", record.public or record.why


@content.register
def _(record: records.Captured) -> Content:
    text = f"captured as snapshot {record.short}: frozen for {record.frozen_s:.3f} s"
    return NORMAL, "Captured", text


@content.register
def _(record: records.CaptureEndedInFailure) -> Content:
    return WARNING, record.reason, record.why


def _does_not_fit(record: Happened) -> str:
    """The codes alone: values of the captured pod are for those who read the node's journal."""
    hint = _CONTENT if volumecontent.CODE in record.codes else ""
    return (
        f"no snapshot fits the container: refused by {', '.join(record.codes)}; "
        f"{Effect.COLD_START}.{hint} `quickthaw explain` on the node shows what differs."
    )
