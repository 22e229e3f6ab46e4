"""Everything that can happen to a container or a snapshot and that people are told of.

Each record is a fact, complete in itself and frozen: a sink that is written later (a timeline, a
stream of events) needs nothing but the record. `why` may show values of a captured pod and is for
a node's journal; `public` is for readers of the pod's namespace.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shim.contract.errors import QuickthawError
    from shim.contract.outcome import Outcome


@dataclass(frozen=True, slots=True)
class Subject:
    """A container of a pod. container: its name. id: empty where no event had it."""

    namespace: str
    pod: str
    uid: str
    container: str
    id: str = ""

    def __str__(self) -> str:
        named = f"{self.namespace}/{self.pod}/{self.container}"
        return f"{named} ({self.id[:12]})" if self.id else named


@dataclass(frozen=True, slots=True, kw_only=True)
class Happened:
    """The base of all records.

    subject: None where the record is about no container that is known. snapshot: an id, or empty.
    reason: a code in one word. codes: checks of the gate that refused. why: a sentence for the
    journal. public: a sentence for Kubernetes events, empty where `why` may be shown.
    """

    subject: Subject | None = None
    snapshot: str = ""
    reason: str = ""
    codes: tuple[str, ...] = ()
    why: str = ""
    public: str = ""
    seconds: float = 0.0

    @property
    def short(self) -> str:
        """The snapshot's id as people read it."""
        return self.snapshot[:12]


class AnnotationRefused(Happened):
    """An annotation of the pod is malformed; the container starts cold."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StartsCold(Happened):
    """The decision was a cold start. is_expected: the pod's author would not be surprised."""

    is_expected: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PassedOver(Happened):
    """A newer snapshot than the restored one is not trusted. reason: the state of the verdict."""


class StartsRestored(Happened):
    """The decision was a restore."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapEnded(Happened):
    """`quickthaw-runc` told how its swap ended.

    result: as in `shim.contract.outcome`. reason: the error's class. is_seen: the daemon was there
    when the container was created. steps: seconds by step.
    """

    result: str
    is_seen: bool = True
    steps: Mapping[str, float] = field(default_factory=dict)


def swap_ended(outcome: Outcome, subject: Subject | None, *, is_seen: bool) -> SwapEnded:
    """Returns the record of an outcome of `quickthaw-runc`, see `shim.contract.outcome`."""
    return SwapEnded(
        subject=subject,
        snapshot=outcome.snapshot,
        is_seen=is_seen,
        result=outcome.result,
        reason=outcome.error_class or "none",
        why=outcome.error,
        seconds=outcome.seconds,
        codes=tuple(outcome.refusals),
        steps=outcome.steps,
    )


class Quarantined(Happened):
    """The snapshot is in quarantine. subject: the container whose restore failed last."""

    __slots__ = ()


class Released(Happened):
    """A person released the snapshot from quarantine."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Evicted(Happened):
    """The daemon removed the snapshot to make room. last_use: unix time."""

    size_bytes: int
    last_use: float


class CaptureRefused(Happened):
    """The pod asks for a capture, and earlier failures speak against it."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured(Happened):
    """A snapshot was published. seconds: in all."""

    frozen_s: float


class CaptureEndedInFailure(Happened):
    """A capture failed and its source goes on. reason: the error's class."""

    __slots__ = ()


def capture_failed(subject: Subject, error: QuickthawError) -> CaptureEndedInFailure:
    """Returns the record of an error of a capture."""
    return CaptureEndedInFailure(subject=subject, reason=type(error).__name__, why=str(error))
