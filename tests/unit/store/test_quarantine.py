"""Quarantine: snapshots that enter, snapshots that leave, and agreement of disk and memory."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shim.contract import errors
from shim.contract.errors import Blame, NotQuarantined, blame_of
from shim.contract.outcome import Outcome
from shim.daemon.failures import OutcomeCounter
from shim.daemon.tracked import Pod
from shim.oci.spec import Spec
from shim.report.reporter import Reporter
from shim.restore import failure as failure_of
from shim.store.quarantine import Health as Count
from shim.store.quarantine import Quarantine, Record, decode, encode
from shim.store.store import Store
from tests.unit.manifests import made
from tests.unit.restore.test_resume import TICKET

IDS = [char * 64 for char in "abc"]
AFTER = 2


def opened(root: Path, snapshots: list[str]) -> Quarantine:
    found = Quarantine(root)
    found.open(snapshots)
    return found


def fail(quarantine: Quarantine, snapshot: str, blame: str = Blame.RESTORE) -> Record | None:
    return quarantine.failed(
        snapshot, blame=blame, error_class="CriuRestoreFailed", reason="why", after=AFTER
    )


class Lives(RuleBasedStateMachine):
    """Snapshots that fail, succeed, are released and removed, while the daemon comes and goes."""

    root: Path

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self._directory = tempfile.TemporaryDirectory()
        self.root = Path(self._directory.name)
        self.exist = set(IDS)
        self.counts = dict.fromkeys(IDS, 0)
        self.kept: set[str] = set()
        self.real = opened(self.root, IDS)

    def teardown(self) -> None:
        self._directory.cleanup()

    @rule(snapshot=st.sampled_from(IDS), blame=st.sampled_from([Blame.CONTENT, Blame.RESTORE]))
    def a_restore_fails(self, snapshot: str, blame: str) -> None:
        if snapshot not in self.exist:
            return
        record = fail(self.real, snapshot, blame)
        if snapshot in self.kept:
            assert record is None
            return
        self.counts[snapshot] += 1
        goes = blame == Blame.CONTENT or self.counts[snapshot] >= AFTER
        assert (record is not None) == goes
        if record:
            assert (record.failures, record.damaged) == (
                self.counts[snapshot],
                blame == Blame.CONTENT,
            )
            self.kept.add(snapshot)
            self.counts[snapshot] = 0

    @rule(snapshot=st.sampled_from(IDS))
    def somebody_else_is_to_blame(self, snapshot: str) -> None:
        assert fail(self.real, snapshot, Blame.OTHER) is None

    @rule(snapshot=st.sampled_from(IDS))
    def a_restore_succeeds(self, snapshot: str) -> None:
        self.real.succeeded(snapshot)
        self.counts[snapshot] = 0

    @rule(snapshot=st.sampled_from(IDS))
    def it_is_released(self, snapshot: str) -> None:
        if snapshot in self.kept:
            self.real.release(snapshot)
            self.kept.remove(snapshot)
        else:
            with pytest.raises(NotQuarantined):
                self.real.release(snapshot)

    @rule(snapshot=st.sampled_from(IDS), told=st.booleans())
    def it_is_removed(self, snapshot: str, told: bool) -> None:
        """told: else the daemon was killed right after the snapshot had gone."""
        self.exist.discard(snapshot)
        if told:
            self.real.drop(snapshot)
        else:
            self.real = opened(self.root, sorted(self.exist))
        self.kept.discard(snapshot)
        self.counts[snapshot] = 0

    @rule()
    def the_daemon_starts_again(self) -> None:
        self.real = opened(self.root, sorted(self.exist))

    @rule(snapshot=st.sampled_from(IDS))
    def a_write_was_cut_off(self, snapshot: str) -> None:
        for directory in ("quarantine", "health"):
            (self.root / directory / f"{snapshot}.json.new").write_text("{")

    @invariant()
    def memory_and_disk_are_what_they_should_be(self) -> None:
        again = Quarantine(self.root)
        again.read()
        for found in (self.real, again):
            assert set(found.all()) == self.kept
            assert {each: found.failures(each) for each in IDS} == self.counts


Lives.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestLives = Lives.TestCase


def test_crash_between_record_and_count_is_repaired_at_the_next_start(tmp_path: Path) -> None:
    quarantine = opened(tmp_path, IDS)
    fail(quarantine, IDS[0])
    count = (tmp_path / "health" / f"{IDS[0]}.json").read_bytes()
    fail(quarantine, IDS[0])
    (tmp_path / "health" / f"{IDS[0]}.json").write_bytes(count)  # as if the count still existed
    again = opened(tmp_path, IDS)
    assert again.get(IDS[0])
    again.release(IDS[0])
    assert fail(opened(tmp_path, IDS), IDS[0]) is None, "a released one begins with a clean count"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 9}', '{"schema": 1}', "\x00"])
def test_unreadable_record_still_keeps_the_snapshot_in_quarantine(
    tmp_path: Path, content: str
) -> None:
    opened(tmp_path, IDS)
    (tmp_path / "quarantine" / f"{IDS[0]}.json").write_text(content)
    (tmp_path / "health" / f"{IDS[1]}.json").write_text(content)
    again = opened(tmp_path, IDS)
    record = again.get(IDS[0])
    assert record
    assert "cannot be read" in record.reason
    assert again.failures(IDS[1]) == 0
    again.release(IDS[0])
    assert opened(tmp_path, IDS).get(IDS[0]) is None


def test_entry_that_is_no_file_stops_nothing(tmp_path: Path) -> None:
    opened(tmp_path, IDS)
    (tmp_path / "quarantine" / f"{IDS[0]}.json").symlink_to("/etc/passwd")
    (tmp_path / "health" / f"{IDS[1]}.json").mkdir()
    os.mkfifo(tmp_path / "quarantine" / f"{IDS[2]}.json")
    again = opened(tmp_path, IDS)
    assert set(again.all()) == {IDS[0], IDS[2]}


RECORD = Record("why", "CriuRestoreFailed", Blame.RESTORE, 2, 1.5, "quickthawd")
values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)


@pytest.mark.parametrize("kind", [Record, Count])
def test_records_survive_writing_and_reading(kind: Any) -> None:
    record = RECORD if kind is Record else Count(1, "why", "CriuRestoreFailed", 2.5)
    assert decode(encode(record), kind) == record


@pytest.mark.parametrize(
    ("name", "value"),
    [("failures", True), ("failures", -1), ("failures", 1.0), ("at", float("nan")), ("at", 1),
     ("blame", "other"), ("blame", None), ("reason", 7), ("reason", "x" * 5000), ("more", 1)],
)  # fmt: skip
def test_a_record_with_a_wrong_value_is_refused(name: str, value: object) -> None:
    wrong = {**json.loads(encode(RECORD)), name: value}
    with pytest.raises(ValueError, match=r"^(failures|at|blame|reason|unknown or missing|NaN)"):
        decode(json.dumps(wrong).encode(), Record)


def test_limit_of_zero_failures_quarantines_only_damaged_snapshots(tmp_path: Path) -> None:
    quarantine = opened(tmp_path, IDS)
    for _ in range(20):
        quarantine.failed(IDS[0], blame=Blame.RESTORE, error_class="x", reason="y", after=0)
    assert quarantine.all() == {}
    quarantine.failed(IDS[0], blame=Blame.CONTENT, error_class="x", reason="y", after=0)
    assert list(quarantine.all()) == [IDS[0]], "what is damaged cannot become whole"


# The cause of a failure


def failure(cls: type[errors.QuickthawError]) -> errors.QuickthawError:
    return cls("what", about="c", why="why", do="Do.")


def test_only_failures_that_the_snapshot_may_cause_are_counted() -> None:
    blames = {
        name: blame_of(failure(cls))
        for name, cls in vars(errors).items()
        if isinstance(cls, type) and issubclass(cls, errors.SwapFailed | errors.BadManifest)
    }
    by = {blame: {name for name in blames if blames[name] == blame} for blame in blames.values()}
    assert {"SnapshotNotWhole", "BadManifest"} <= by[Blame.CONTENT]
    assert {"NoTurn", "TicketUnreadable", "SnapshotDoesNotFit"} <= by[Blame.OTHER]
    assert {"ResumeFailed", "ShmNotFilled", "NetworkNotReady"} <= by[Blame.OTHER], "a pod's doing"
    assert {"CriuRestoreFailed", "SwapTooLate", "SwapFailed"} <= by[Blame.RESTORE]


@pytest.mark.parametrize(
    ("reason", "is_its"),
    [
        ("criu: Can't bind inet socket (id 7): Address already in use", True),
        ("criu: Can't fork for 7: Resource temporarily unavailable", True),
        ("criu: 20 killed by signal 9: Killed", True),
        ("criu: 20 killed by signal 11: Segmentation fault", False),
        ("criu: File data/model.bin has bad size 5 (expect 4096)", True),
        ("criu: Can't open file data/model.bin on restore: No such file or directory", True),
        ("criu: Can't open file srv/other on restore: No such file or directory", False),
        ("criu: Can't map 7f00: Invalid argument", False),
        ("runc: criu failed", False),
    ],
)
def test_failure_of_criu_because_of_the_pod_does_not_count(reason: str, is_its: bool) -> None:
    assert failure_of.is_of_the_pod(reason, ["/data/model.bin", "/"]) == is_its


@pytest.mark.parametrize("cls", [OSError, errors.CriuRestoreFailed])
def test_lack_of_resources_on_the_node_does_not_count(cls: type[Exception]) -> None:
    error = failure(errors.SwapFailed)
    error.__cause__ = OSError(28, "No space left on device")
    assert blame_of(error) == Blame.OTHER
    error.__cause__ = OSError(5, "Input/output error")
    assert blame_of(error) == Blame.RESTORE


# The daemon's use of failures


def told(store: Store, *outcomes: Outcome) -> Reporter:
    """Gives the daemon's worker the outcomes and then ends the worker."""
    reporter = Reporter()

    async def run() -> None:
        health = OutcomeCounter(store, reporter, after=AFTER, default_deadline_s=100)
        task = asyncio.create_task(health.serve())
        for each in outcomes:
            health.told(each, None, "main")
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(run())
    return reporter


def an_outcome(result: str = "cold", **changed: object) -> Outcome:
    fields: dict[str, object] = {
        "snapshot": made().id, "result": result, "error": "why", "blame": Blame.RESTORE,
        "error_class": "CriuRestoreFailed",
    }  # fmt: skip
    return Outcome(**fields | changed)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(str(tmp_path))
    found.open()
    place = found.snapshots / made().id
    (place / "criu").mkdir(parents=True)
    (place / "manifest.json").write_bytes(made().encode())
    found.read_index()
    return found


def test_second_failure_in_a_row_triggers_quarantine(store: Store) -> None:
    told(store, an_outcome())
    assert store.quarantine.failures(made().id) == 1
    again = Store(str(store.root))
    again.open()
    reporter = told(again, an_outcome())
    assert again.quarantine.get(made().id), "counts outlive a daemon"
    assert reporter.metrics.counters() == {
        'quickthaw_quarantines_total{reason="CriuRestoreFailed"}': 1.0
    }


@pytest.mark.parametrize(
    ("cpu", "is_its"),
    [
        ({"quota": 10_000, "period": 100_000}, True),
        ({"quota": 10_000}, True),
        ({"quota": 100_000, "period": 100_000}, False),
        ({"quota": 0, "period": 100_000}, False),
        ({"quota": -1}, False),
        ({"shares": 2}, False),
        ({"quota": "1"}, False),
        (None, False),
    ],
)
def test_deadline_of_a_pod_without_a_whole_processor_does_not_count(
    cpu: object, is_its: bool
) -> None:
    spec = Spec({"linux": {"resources": {"cpu": cpu}}})
    given = TICKET
    found = failure_of.too_late(given, spec, "in step criu", "100 s are over", of_snapshot=True)
    assert blame_of(found) == (Blame.OTHER if is_its else Blame.RESTORE)


def test_pod_counts_once_and_a_short_deadline_does_not_count(store: Store) -> None:
    health = OutcomeCounter(store, Reporter(), after=AFTER, default_deadline_s=100)
    one, other = (Pod("models", uid, uid, "sandbox") for uid in ("uid-1", "uid-2"))
    late = [an_outcome(error_class="SwapTooLate", deadline_s=each) for each in (99.0, 100.0)]

    async def tell(outcome: Outcome, *pods: Pod) -> None:
        for pod in pods:
            health.told(outcome, pod, "main")
        task = asyncio.create_task(health.serve())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(tell(late[0], one, other))
    assert store.quarantine.failures(made().id) == 0
    asyncio.run(tell(late[1], one, one, one))
    assert store.quarantine.failures(made().id) == 1
    again = opened(store.root, [made().id])
    assert again.failed(
        made().id, blame=Blame.RESTORE, error_class="x", reason="y", after=AFTER, cause="uid-1"
    ) is None, "causes outlive a daemon"  # fmt: skip
    asyncio.run(tell(an_outcome(), other))
    assert store.quarantine.get(made().id)


def test_success_in_between_resets_the_count(store: Store) -> None:
    told(store, an_outcome(), an_outcome("restored", error="", blame=""), an_outcome())
    assert store.quarantine.all() == {}
    assert store.quarantine.failures(made().id) == 1
    assert store.last_use(made()) > made().created_at


def test_failure_of_an_unknown_snapshot_or_cause_is_not_counted(store: Store) -> None:
    unknown = ["", "f" * 64]
    told(store, *(an_outcome(snapshot=each, blame=Blame.CONTENT) for each in unknown))
    told(store, an_outcome(blame=Blame.OTHER), an_outcome(blame=""))
    told(store, an_outcome(blame=Blame.OTHER), an_outcome(blame="x"))
    assert os.listdir(store.root / "quarantine") == os.listdir(store.root / "health") == []


def test_a_removed_snapshot_leaves_no_record(store: Store) -> None:
    told(store, an_outcome(blame=Blame.CONTENT))
    assert store.quarantine.get(made().id)
    store.remove(made().id, users=[])
    assert store.quarantine.all() == {}
    assert os.listdir(store.root / "quarantine") == []


def test_quarantine_is_known_before_a_like_container_is_captured(store: Store) -> None:
    seen: list[bool] = []

    async def run() -> None:
        health = OutcomeCounter(store, Reporter(), after=AFTER, default_deadline_s=100)
        task = asyncio.create_task(health.serve())
        done = asyncio.Event()

        def then() -> None:
            seen.append(store.quarantine.get(made().id) is not None)
            done.set()

        health.told(an_outcome(blame=Blame.CONTENT), None, "main", then)
        await asyncio.wait_for(done.wait(), 5)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(run())
    assert seen == [True]
