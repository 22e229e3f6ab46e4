"""Reports to people: each failure in the journal, in a metric and in an event of the pod."""

import logging
from typing import Any

import pytest

from shim.contract import errors
from shim.contract.errors import Blame
from shim.contract.names import ContainerId
from shim.daemon.registry import Pod, Tracked
from shim.daemon.reporter import Reporter
from shim.kube.event import NORMAL, WARNING, Event
from shim.nri.annotations import Wish
from shim.store.quarantine import Record

POD = Pod("models", "inference-0", "u-1", "sandbox")
SECRET = "PASSWORD=hunter2"  # noqa: S105 - it must not get out
SNAPSHOT = "5" * 64


class Sent:
    """In the place of the sender."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def send(self, event: Event) -> None:
        self.events.append(event)


@pytest.fixture
def sent() -> Sent:
    return Sent()


@pytest.fixture
def reporter(sent: Sent, caplog: pytest.LogCaptureFixture) -> Reporter:
    caplog.set_level(logging.INFO)
    found = Reporter()
    sender: Any = sent
    found._sender = sender
    return found


def tracked(**wish: Any) -> Tracked:
    made = Tracked(ContainerId("c" * 64), "server", POD, Wish(**wish or {"snapshot": "auto"}))
    made.snapshot = SNAPSHOT
    return made


def an_error(cls: type[errors.QuickthawError]) -> errors.QuickthawError:
    return cls("what", container="c", why="why", do="Do.")


def an_outcome(cls: type[errors.QuickthawError], **more: object) -> dict[str, object]:
    error = an_error(cls)
    return {
        "snapshot": SNAPSHOT, "result": "cold", "error": str(error),
        "error_class": cls.__name__, "seconds": 0.5,
    } | more  # fmt: skip


def classes(base: type[errors.QuickthawError]) -> list[type[errors.QuickthawError]]:
    return [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, base)]


@pytest.mark.parametrize("cls", [*classes(errors.SwapFailed), errors.BadManifest])
@pytest.mark.parametrize("seen", [True, False])
def test_failed_swap_is_reported_in_journal_metric_and_event(
    reporter: Reporter, sent: Sent, caplog: pytest.LogCaptureFixture, cls: Any, seen: bool
) -> None:
    if seen:
        reporter.swapped(tracked(), an_outcome(cls))
    else:
        reporter.swapped_unseen(POD, "server", an_outcome(cls))
    (line,) = caplog.records
    assert (line.levelno, "why" in line.message) == (logging.WARNING, True)
    assert "inference-0" in line.message
    name = f'quickthaw_restores_total{{reason="{cls.__name__}",result="cold"}}'
    assert reporter.counters()[name] == 1
    (event,) = sent.events
    assert (event.kind, event.reason) == (WARNING, cls.__name__)
    assert (event.namespace, event.pod, event.uid) == ("models", "inference-0", "u-1")
    assert (event.container, "why" in event.message) == ("server", True)


@pytest.mark.parametrize("cls", classes(errors.CaptureFailed))
def test_failed_capture_is_reported_in_journal_metric_and_event(
    reporter: Reporter, sent: Sent, caplog: pytest.LogCaptureFixture, cls: Any
) -> None:
    reporter.not_captured(tracked(), an_error(cls))
    assert caplog.records[0].levelno == logging.WARNING
    name = f'quickthaw_captures_total{{reason="{cls.__name__}",result="failed"}}'
    assert reporter.counters() == {name: 1}
    assert [(each.kind, each.reason) for each in sent.events] == [(WARNING, cls.__name__)]


def test_values_of_another_pod_are_in_no_event(
    reporter: Reporter, sent: Sent, caplog: pytest.LogCaptureFixture
) -> None:
    why = f"does not fit: env: the snapshot has [{SECRET!r}]"
    reporter.no_restore(tracked(), "env", why, ["env", "mounts"])
    reporter.swapped(
        tracked(), an_outcome(errors.SnapshotDoesNotFit, error=why, refusals=["env", "mounts"])
    )
    assert SECRET in caplog.text, "root may read it in the journal"
    for event in sent.events:
        assert SECRET not in event.message
        assert "env, mounts" in event.message
        assert "explain" in event.message
    assert [event.reason for event in sent.events] == ["RestoreRefused", "SnapshotDoesNotFit"]


def test_facts_of_another_namespace_are_in_the_journal_only(
    reporter: Reporter, sent: Sent, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = "2 restores failed in a row, the last: of their pod"
    reporter.no_restore(tracked(), "quarantine", theirs, public="snapshot a is in quarantine")
    reporter.not_to_capture(tracked(), theirs, public="a like snapshot is in quarantine")
    assert caplog.text.count(theirs) == 2
    assert len(sent.events) == 2
    assert all("in quarantine" in each.message and theirs not in each.message
               for each in sent.events)  # fmt: skip


@pytest.mark.parametrize(
    ("wish", "reason", "told"),
    [
        ({"snapshot": "auto"}, "NoSnapshot", False),
        ({"snapshot": "auto"}, "Restart", False),
        ({"restore": "warm"}, "NoSnapshot", True),
        ({"snapshot": "auto"}, "quarantine", True),
        ({"snapshot": "auto"}, "signature", True),
        ({"restore": "sha256:1"}, "NoSuchSnapshot", True),
        ({"snapshot": "auto"}, "Unknown", True),
    ],
)
def test_cold_start_by_request_of_the_pod_is_no_event(
    reporter: Reporter, sent: Sent, wish: dict[str, str], reason: str, told: bool
) -> None:
    reporter.no_restore(tracked(**wish), reason, "why")
    assert [event.reason for event in sent.events] == ["RestoreRefused"] * told


def test_other_outcomes_are_reported_too(reporter: Reporter, sent: Sent) -> None:
    reporter.swapped(tracked(), {"snapshot": SNAPSHOT, "result": "restored", "seconds": 0.25})
    reporter.captured(tracked(), 0.1, 0.2)
    reporter.bad_annotation(POD, "server", an_error(errors.BadAnnotation))
    reporter.not_to_capture(tracked(), "one like it is in quarantine")
    record = Record("why", "CriuRestoreFailed", Blame.RESTORE, 2, 1.0, "quickthawd")
    reporter.quarantined(SNAPSHOT, record, POD, "server")
    reporter.quarantined(SNAPSHOT, record, None, "")
    assert [(event.kind, event.reason) for event in sent.events] == [
        (NORMAL, "Restored"),
        (NORMAL, "Captured"),
        (WARNING, "BadAnnotation"),
        (WARNING, "NotCaptured"),
        (WARNING, "SnapshotQuarantined"),
    ]


def test_without_a_kubeconfig_nothing_is_sent(caplog: pytest.LogCaptureFixture) -> None:
    reporter = Reporter()
    with reporter.telling_kubernetes(""):
        reporter.not_captured(tracked(), an_error(errors.NoRoom))
    assert "kubernetes" not in str(reporter.counters())


def test_missing_kubeconfig_is_a_journal_line_and_no_failure(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    reporter = Reporter()
    with reporter.telling_kubernetes(str(tmp_path / "none")):
        reporter.not_captured(tracked(), an_error(errors.NoRoom))
    assert "no Kubernetes events meanwhile" in caplog.text
    counted = reporter.counters()
    assert counted['quickthaw_kubernetes_events_total{result="failed"}'] == 1
