from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from shim.contract import manifest
from shim.contract.errors import NoSuchSnapshot, NotPublished, SnapshotInUse
from shim.integrity.check import SnapshotCheck
from shim.kernel.stopping import Stop, Stopped
from shim.store.listing import listed, shown
from shim.store.store import Store
from tests.unit.manifests import SOURCE, fields, made
from tests.unit.trusting import TrustsAll

if TYPE_CHECKING:
    from pathlib import Path

    from shim.contract.manifest import File, Manifest


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made_store = Store(str(tmp_path / "store"))
    made_store.open()
    return made_store


def publish(store: Store, **changed: object) -> Manifest:
    def describe(files: tuple[File, ...]) -> Manifest:
        return manifest.build(**fields(files=files, **changed))

    with store.staged() as staged:
        (staged / "criu").mkdir()
        (staged / "criu/pages-1.img").write_bytes(b"x" * 4096)
        return store.publish(staged, describe)


def test_published_snapshot_is_found_by_id_name_and_key(store: Store) -> None:
    found = publish(store)
    assert store.all() == [found]
    assert store.find(namespace="models", key="a" * 64, name="warm") == [found]
    for wanted in (
        found.id,
        found.id[:12],
        f"sha256:{found.id}",
        f"sha256:{found.id[:12]}",
        "warm",
    ):
        assert store.get(wanted) == found
    assert store.find(namespace="other") == store.find(key="b" * 64) == []


def test_newest_snapshot_comes_first(store: Store) -> None:
    ids = [publish(store, created_at=float(age)).id for age in (2, 3, 1)]
    assert [found.id for found in store.find(name="warm")] == [ids[1], ids[0], ids[2]]
    assert store.get("warm").id == ids[1]


def test_published_snapshot_is_whole_and_private(store: Store) -> None:
    found = publish(store)
    place = store.snapshots / found.id
    fd = os.open(place, os.O_RDONLY)
    with SnapshotCheck(fd, found, container="c1", until=math.inf, with_marks=False) as check:
        check.begin()
        check.finish()
    os.close(fd)
    assert place.stat().st_mode & 0o777 == 0o700
    assert (place / "manifest.json").stat().st_mode & 0o777 == 0o600
    assert not list(store.staging.iterdir())


def test_the_index_is_made_again_from_the_manifests(store: Store) -> None:
    found = publish(store)
    again = Store(str(store.root))
    again.open()
    assert again.all() == [found]


def test_left_overs_in_staging_are_removed_at_the_next_start(store: Store) -> None:
    (store.staging / "left" / "deep").mkdir(parents=True)
    (store.staging / "left" / "deep" / "file").touch()
    store.open()
    assert not list(store.staging.iterdir())
    leaving = store.root / "leaving"
    assert len(list(leaving.rglob("*"))) == 4, "it is put aside, however much that is"
    with pytest.raises(Stopped):
        store.empty_leaving(Stop(0))
    store.open()
    store.empty_leaving(Stop())
    assert not list(leaving.iterdir())


def test_a_publication_can_be_stopped_until_the_snapshot_exists(store: Store) -> None:
    stop = Stop()
    stop.tell()
    with store.staged() as staged:
        (staged / "criu").mkdir()
        with pytest.raises(Stopped):
            store.publish(staged, lambda files: made(files=files), stop)
    assert store.all() == []
    assert not list(store.snapshots.iterdir())


def test_log_of_a_failed_restore_is_removed_with_its_snapshot(store: Store, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    again = Store(str(store.root), logs_directory=str(logs))
    found = publish(store)
    again.open()
    for name in (found.id, "0" * 64):
        (logs / f"{name}.log").touch()
    again.forget_logs()
    assert [path.stem for path in logs.iterdir()] == [found.id]
    again.remove(found.id, users=[])
    assert not list(logs.iterdir())


def test_a_failed_capture_leaves_nothing(store: Store) -> None:
    def capture() -> None:
        with store.staged() as staged:
            (staged / "criu").mkdir()
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        capture()
    assert not list(store.staging.iterdir())
    assert not list(store.snapshots.iterdir())


def test_unpublishable_snapshot_does_not_exist(store: Store) -> None:
    with pytest.raises(NotPublished), store.staged() as staged:
        store.publish(staged, lambda _files: made())  # nothing was captured
    assert not list(store.snapshots.iterdir())
    assert store.all() == []


@pytest.mark.parametrize(
    "damage", ["no manifest", "garbage", "newer schema", "another's", "a file"]
)
def test_a_damaged_snapshot_is_listed_and_stops_nothing(store: Store, damage: str) -> None:
    good = publish(store)
    broken = store.snapshots / ("e" * 64)
    if damage == "a file":
        broken.write_text("")
    else:
        broken.mkdir()
    if damage == "garbage":
        (broken / "manifest.json").write_text("{")
    if damage == "newer schema":
        (broken / "manifest.json").write_text('{"schema": 2}')
    if damage == "another's":
        (broken / "manifest.json").write_bytes(made().encode())
    store.open()
    assert store.all() == [good]
    assert list(store.damaged) == ["e" * 64]
    assert [row["state"] for row in listed(store, {}, trust=TrustsAll())["snapshots"]] == [
        "ready",
        "damaged",
    ]


def test_a_snapshot_in_use_is_not_removed(store: Store) -> None:
    found = publish(store)
    with pytest.raises(SnapshotInUse, match="pod-1"):
        store.remove(found.id, users=["pod-1"])
    assert store.get(found.id) == found


def test_a_removed_snapshot_is_gone(store: Store) -> None:
    found = publish(store)
    store.remove(found.id, users=[])
    assert not list(store.snapshots.iterdir())
    assert not list(store.staging.iterdir())
    with pytest.raises(NoSuchSnapshot):
        store.get(found.id)


def test_error_of_an_unknown_id_lists_the_known_ids(store: Store) -> None:
    found = publish(store)
    with pytest.raises(NoSuchSnapshot, match=found.id[:12]):
        store.get("0000")
    for wanted in ("", "sha256:", "/", "..", "\0"):
        with pytest.raises(NoSuchSnapshot):
            store.get(wanted)


def test_snapshots_of_another_namespace_are_answered_as_missing(store: Store) -> None:
    theirs = publish(store)
    answers = {}
    for wanted in (theirs.id, theirs.id[:12], f"sha256:{theirs.id}", "warm", "models/warm"):
        with pytest.raises(NoSuchSnapshot) as raised:
            store.get(wanted, namespace="other")
        answers[wanted] = str(raised.value).replace(wanted, "")
    with pytest.raises(NoSuchSnapshot) as raised:
        store.get("e" * 64, namespace="other")
    assert set(answers.values()) == {str(raised.value).replace("e" * 64, "")}
    assert store.get(theirs.id, namespace="models") == theirs
    assert store.get("models/warm", namespace="models") == store.get("models/warm") == theirs


def test_a_name_of_two_namespaces_needs_the_namespace(store: Store) -> None:
    older, newer = publish(store, created_at=1.0), publish(store, created_at=2.0)
    assert store.get("warm") == newer, "of several in one namespace the newest is meant"
    there = {**SOURCE, "namespace": "other"}
    other = publish(store, created_at=3.0, source=there)
    with pytest.raises(NoSuchSnapshot, match=r"2 namespaces.*models/warm, other/warm"):
        store.get("warm")
    assert store.get("models/warm") == store.get("warm", namespace="models") == newer
    assert store.get("other/warm") == other
    assert store.get(f"other/{other.id[:12]}") == other
    assert older in store.all()


def test_ambiguous_prefix_is_refused(store: Store) -> None:
    store._by_id = {char * 4 + "0" * 60: made() for char in "ab"}
    store._by_id["a" * 5 + "0" * 59] = made()
    with pytest.raises(NoSuchSnapshot, match="several"):
        store.get("aaaa")


def test_a_thousand_snapshots_are_searched_in_a_millisecond(store: Store) -> None:
    one = made().as_json()
    for number in range(1000):
        source = SOURCE | {"namespace": f"n{number % 7}"}
        fresh = {**one, "id": f"{number:064x}", "key": f"{number % 50:064x}", "source": source}
        store._by_id[f"{number:064x}"] = manifest.Manifest(**fresh)
    taken = []
    for _ in range(20):
        began = time.perf_counter()
        assert store.find(namespace="n3", key=f"{3:064x}")
        taken.append(time.perf_counter() - began)
    assert min(taken) < 0.001


def test_listings_are_json(store: Store) -> None:
    found = publish(store)
    rows = listed(store, {found.id: ["c1"]}, trust=TrustsAll())["snapshots"]
    assert (rows[0]["uses"], rows[0]["size_bytes"]) == (1, 4106)
    assert listed(store, None, trust=TrustsAll())["snapshots"][0]["uses"] is None
    told = shown(store, found, {found.id: ["c1"]}, trust=TrustsAll(), log="/x/restore.log")
    assert (told["uses"], told["users"], told["log"]) == (1, ["c1"], "/x/restore.log")
    json.dumps([rows, told])


def test_the_index_is_searched_while_snapshots_come_and_go(store: Store) -> None:
    one, stop, wrong = made(), threading.Event(), []

    def change() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            store._by_id[f"{number % 500:064x}"] = one
            store._by_id.pop(f"{(number + 250) % 500:064x}", None)

    threads = [threading.Thread(target=change) for _ in range(2)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    for thread in threads:
        thread.start()
    try:
        for _ in range(300):
            store.find(key="b" * 64)
            with contextlib.suppress(NoSuchSnapshot):
                store.get("fffff")
    except RuntimeError as error:
        wrong.append(error)
    finally:
        stop.set()
        sys.setswitchinterval(before)
        for thread in threads:
            thread.join()
    assert wrong == []
