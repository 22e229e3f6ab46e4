"""The journal's line for each record: subject, event, cause, remedy. Written once for a record."""

from __future__ import annotations

import logging
import time
from functools import singledispatch
from typing import TYPE_CHECKING

from shim.contract import outcome
from shim.kernel.steps import durations
from shim.report import records

if TYPE_CHECKING:
    from shim.report.records import Happened

log = logging.getLogger("quickthawd")


def tell(record: Happened) -> None:
    """Write the record's line."""
    level, text = line(record)
    log.log(level, "%s", text)


@singledispatch
def line(record: Happened) -> tuple[int, str]:
    """Returns the level and the text of the line."""
    raise NotImplementedError(f"the journal has no line for {type(record).__name__}")


@line.register
def _(record: records.AnnotationRefused) -> tuple[int, str]:
    return logging.WARNING, f"{record.subject}: {record.why}"


@line.register
def _(record: records.StartsCold) -> tuple[int, str]:
    return logging.INFO, f"{record.subject} starts cold: {record.why}"


@line.register
def _(record: records.PassedOver) -> tuple[int, str]:
    text = f"{record.subject} does not start from snapshot {record.short}, which is newer"
    return logging.WARNING, f"{text}: {record.why}"


@line.register
def _(record: records.StartsRestored) -> tuple[int, str]:
    return logging.INFO, f"{record.subject} is to start from snapshot {record.short}"


@line.register
def _(record: records.SwapEnded) -> tuple[int, str]:
    if record.result == outcome.RESTORED:
        text = f"{record.subject} restored from {record.short} in {record.seconds:.3f} s"
        steps = dict(record.steps) if "gpu" in record.steps else durations(record.steps)
        return logging.INFO, f"{text} {steps}"
    if not record.why and not record.is_seen:
        return logging.INFO, f"while quickthawd was away: {record.subject} was {record.result}"
    named = f"{record.subject}: " if record.subject else ""
    away = "" if record.is_seen else "while quickthawd was away: "
    return logging.WARNING, f"{away}{named}{record.why}"


@line.register
def _(record: records.Quarantined) -> tuple[int, str]:
    return logging.WARNING, (
        f"snapshot {record.short} goes to quarantine: {record.why}; pods start cold. Look at its "
        f"log with `quickthaw show {record.short}`, then `quickthaw quarantine release` or "
        "`quickthaw rm` it."
    )


@line.register
def _(record: records.Released) -> tuple[int, str]:
    return logging.INFO, f"snapshot {record.short} is released from quarantine"


@line.register
def _(record: records.Evicted) -> tuple[int, str]:
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.last_use))
    return logging.INFO, (
        f"snapshot {record.short} ({record.size_bytes} bytes, last used {when}) is removed to "
        "make room for another"
    )


@line.register
def _(record: records.CaptureRefused) -> tuple[int, str]:
    return logging.WARNING, f"{record.subject} is not captured: {record.why}"


@line.register
def _(record: records.Captured) -> tuple[int, str]:
    return logging.INFO, (
        f"{record.subject} captured as {record.short}: frozen {record.frozen_s:.3f} s, "
        f"{record.seconds:.3f} s in all"
    )


@line.register
def _(record: records.CaptureEndedInFailure) -> tuple[int, str]:
    return logging.WARNING, f"{record.subject}: {record.why}"
