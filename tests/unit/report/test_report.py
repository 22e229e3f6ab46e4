"""Every record is in the journal, a metric and an event, as far as each is meant to have it."""

import logging
from dataclasses import replace
from typing import Any

import pytest

from shim.contract import errors
from shim.kube.event import NORMAL, WARNING, PodEvent
from shim.report import events, journal, records
from shim.report.records import Happened, Subject
from shim.report.reporter import Reporter

POD = Subject("models", "inference-0", "u-1", "server", "c" * 64)
SECRET = "PASSWORD=hunter2"  # noqa: S105 - it must not get out
SNAPSHOT = "5" * 64
SAMPLES: dict[type[Happened], Happened] = {
    type(each): each
    for each in (
        records.AnnotationRefused(subject=POD, why="malformed"),
        records.StartsCold(subject=POD, reason="NoSnapshot", why="there is none"),
        records.PassedOver(subject=POD, snapshot=SNAPSHOT, reason="revoked", why="revoked key"),
        records.StartsRestored(subject=POD, snapshot=SNAPSHOT),
        records.SwapEnded(
            subject=POD, snapshot=SNAPSHOT, result="restored", seconds=0.25, steps={"criu": 0.1}
        ),
        records.Quarantined(subject=POD, snapshot=SNAPSHOT, reason="CriuRestoreFailed", why="2"),
        records.Released(snapshot=SNAPSHOT),
        records.Evicted(snapshot=SNAPSHOT, size_bytes=5, last_use=0.0),
        records.CaptureRefused(subject=POD, reason="quarantine", why="one like it failed"),
        records.Captured(subject=POD, snapshot=SNAPSHOT, frozen_s=0.1, seconds=0.2),
        records.CaptureEndedInFailure(subject=POD, reason="NoRoom", why="the disk is full"),
    )
}


def failed_swap(cls: type[errors.QuickthawError], **more: Any) -> records.SwapEnded:
    error = cls("what", about="c", why="why", do="Do.")
    found = records.SwapEnded(
        subject=POD, snapshot=SNAPSHOT, result="cold", reason=cls.__name__, why=str(error)
    )
    return replace(found, **more)


def classes(base: type[errors.QuickthawError]) -> list[type[errors.QuickthawError]]:
    return [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, base)]


def event_of(record: Happened) -> PodEvent:
    event = events.of(record)
    assert event is not None
    return event


def test_there_is_a_sample_of_every_record() -> None:
    found = (each for each in vars(records).values() if isinstance(each, type))
    assert {each for each in found if issubclass(each, Happened)} - {Happened} == set(SAMPLES)


@pytest.mark.parametrize("record", SAMPLES.values(), ids=lambda record: type(record).__name__)
def test_journal_has_a_line_for_every_record(record: Happened) -> None:
    level, text = journal.line(record)
    assert level in (logging.INFO, logging.WARNING)
    assert str(record.subject or record.short) in text or record.short in text
    assert record.why in text


@pytest.mark.parametrize("record", SAMPLES.values(), ids=lambda record: type(record).__name__)
def test_reporter_hands_every_record_to_every_sink(
    record: Happened, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    reporter, seen = Reporter(), list[Happened]()
    with reporter.also(seen.append):
        reporter.tell(record)
    reporter.tell(record)
    assert seen == [record], "the sink is told inside of the `with` alone"
    assert len(caplog.records) == 2


def test_events_are_for_the_pods_author() -> None:
    made = {type(each).__name__: events.of(each) for each in SAMPLES.values()}
    assert {name: (event.kind, event.reason) for name, event in made.items() if event} == {
        "AnnotationRefused": (WARNING, "BadAnnotation"),
        "StartsCold": (WARNING, "RestoreRefused"),
        "SwapEnded": (NORMAL, "Restored"),
        "Quarantined": (WARNING, "SnapshotQuarantined"),
        "CaptureRefused": (WARNING, "NotCaptured"),
        "Captured": (NORMAL, "Captured"),
        "CaptureEndedInFailure": (WARNING, "NoRoom"),
    }


def test_a_record_without_a_subject_is_no_event() -> None:
    assert events.of(replace(SAMPLES[records.Quarantined], subject=None)) is None


@pytest.mark.parametrize("is_seen", [True, False])
@pytest.mark.parametrize("cls", [*classes(errors.SwapFailed), errors.BadManifest])
def test_failed_swap_is_told_everywhere(
    cls: type[errors.QuickthawError], is_seen: bool, caplog: pytest.LogCaptureFixture
) -> None:
    reporter, record = Reporter(), failed_swap(cls, is_seen=is_seen)
    reporter.tell(record)
    (line,) = caplog.records
    assert (line.levelno, "why" in line.message) == (logging.WARNING, True)
    assert "inference-0" in line.message
    name = f'quickthaw_restores_total{{reason="{cls.__name__}",result="cold"}}'
    assert reporter.metrics.counters() == {name: 1}
    event = event_of(record)
    assert (event.kind, event.reason) == (WARNING, cls.__name__)
    assert (event.namespace, event.pod, event.uid) == ("models", "inference-0", "u-1")
    assert (event.container, "why" in event.message) == ("server", True)


@pytest.mark.parametrize("cls", classes(errors.CaptureFailed))
def test_failed_capture_is_counted_by_its_class(cls: type[errors.QuickthawError]) -> None:
    reporter = Reporter()
    reporter.tell(records.CaptureEndedInFailure(subject=POD, reason=cls.__name__, why="why"))
    name = f'quickthaw_captures_total{{reason="{cls.__name__}",result="failed"}}'
    assert reporter.metrics.counters() == {name: 1}


def test_values_of_another_pod_are_in_the_journal_and_in_no_event() -> None:
    why, codes = f"does not fit: env: the snapshot has [{SECRET!r}]", ("env", "mounts")
    for record in (
        records.StartsCold(subject=POD, reason="env", why=why, codes=codes),
        failed_swap(errors.SnapshotDoesNotFit, why=why, codes=codes),
    ):
        assert SECRET in journal.line(record)[1]
        message = event_of(record).message
        assert SECRET not in message
        assert "env, mounts" in message
        assert "explain" in message


@pytest.mark.parametrize("cls", [records.StartsCold, records.CaptureRefused, records.Quarantined])
def test_event_has_the_public_sentence_where_there_is_one(cls: type[Happened]) -> None:
    theirs, public = "2 restores failed, the last: of their pod", "a like snapshot is quarantined"
    record = replace(SAMPLES[cls], why=theirs, public=public)
    assert theirs in journal.line(record)[1]
    assert theirs not in event_of(record).message
    assert public in event_of(record).message


def test_expected_cold_start_is_no_event() -> None:
    assert events.of(replace(SAMPLES[records.StartsCold], is_expected=True)) is None  # type: ignore[call-arg]


def test_refusing_checks_are_counted_one_by_one() -> None:
    reporter = Reporter()
    reporter.tell(records.StartsCold(subject=POD, reason="env", codes=("env", "mounts")))
    assert reporter.metrics.counters() == {
        'quickthaw_restores_total{reason="env",result="cold"}': 1,
        'quickthaw_refusals_total{check="env"}': 1,
        'quickthaw_refusals_total{check="mounts"}': 1,
    }


def test_without_a_kubeconfig_nothing_is_sent() -> None:
    reporter = Reporter()
    with reporter.telling_kubernetes(""):
        reporter.tell(SAMPLES[records.CaptureEndedInFailure])
    assert "kubernetes" not in str(reporter.metrics.counters())


def test_kubeconfig_that_is_not_there_is_a_line_and_no_more(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    reporter = Reporter()
    with reporter.telling_kubernetes(str(tmp_path / "none")):
        reporter.tell(SAMPLES[records.CaptureEndedInFailure])
    assert "no Kubernetes events meanwhile" in caplog.text
    assert reporter.metrics.counters()['quickthaw_kubernetes_events_total{result="failed"}'] == 1
