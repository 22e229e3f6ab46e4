"""Room for snapshots: evicted snapshots, kept snapshots, refused captures."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.contract import limits, ticket
from shim.contract import manifest as manifests
from shim.contract.errors import Blame, CriuDumpFailed, NoRoom, SnapshotTooBig
from shim.contract.names import ContainerId
from shim.daemon import room as rooms
from shim.daemon import users as using
from shim.daemon.config import Config
from shim.daemon.registry import Registry
from shim.daemon.room import Room
from shim.daemon.tracked import Pod, State, Tracked
from shim.kernel.stopping import Stop, Stopped
from shim.report.reporter import Reporter
from shim.source import estimate
from shim.source.estimate import Amount
from shim.store.room import Candidate, Disk, Limits, Shares, disk, excess, victims
from shim.store.store import Store
from shim.workload.annotations import Wish
from tests.unit.manifests import SOURCE, fields

NO_LIMITS = Limits()
MIB = 1 << 20

candidates = st.lists(
    st.builds(
        Candidate, st.text("abc", min_size=1), st.integers(0, 100), st.floats(0, 100), st.booleans()
    ),
    unique_by=lambda each: each.id,
)


@given(st.integers(-10, 500), candidates)
def test_victims_are_the_oldest_and_no_more_than_needed(
    wanted: int, found: list[Candidate]
) -> None:
    chosen = victims(wanted, found)
    if chosen is None:
        assert sum(each.size_bytes for each in found) < wanted
        return
    assert sum(each.size_bytes for each in chosen) >= wanted
    assert sum(each.size_bytes for each in chosen[:-1]) < wanted or not chosen
    spared = [each for each in found if each not in chosen]
    for gone in chosen:
        for stays in spared:
            assert (not gone.useless, gone.last_use) <= (not stays.useless, stays.last_use)


@given(
    st.integers(1, 500), candidates, st.lists(st.sampled_from("xyz")), st.integers(0, 300),
    st.integers(0, 100),
)  # fmt: skip
def test_no_namespace_loses_its_share_to_another(
    wanted: int, found: list[Candidate], names: list[str], share: int, needed: int
) -> None:
    owned = [replace(each, namespace=name) for each, name in zip(found, names, strict=False)]
    used = {name: sum(each.size_bytes for each in owned if each.namespace == name)
            for name in "xyz"}  # fmt: skip
    given = Shares("x", needed, share, used)
    chosen = victims(wanted, owned, given) or []
    others = [each for each in chosen if each.namespace != "x" and not each.useless]
    if others:
        assert used["x"] + needed <= share
        assert all(each in chosen for each in owned if each.namespace == "x")
    for name in "yz":
        gone = [each.size_bytes for each in others if each.namespace == name]
        assert used[name] - sum(gone[:-1]) > share or not gone


@given(
    st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 1000),
    st.integers(0, 500), st.integers(0, 99),
)  # fmt: skip
def test_admitted_snapshot_keeps_within_every_limit(
    used: int, needed: int, free: int, most: int, keep: int, percent: int
) -> None:
    limits = Limits(0, most, keep, percent)
    found = excess(limits, Disk(1000, free), used, needed, needed)
    if found.size_bytes <= 0:
        assert not most or used + needed <= most
        assert free - needed >= keep
        assert free - needed >= 1000 * percent // 100
    else:
        assert found.why


def test_free_space_is_read_from_the_disk_of_the_store(tmp_path: Path) -> None:
    there = disk(tmp_path)
    assert 0 < there.free_bytes < there.size_bytes


# In the daemon


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    tickets = tmp_path / "tickets"
    tickets.mkdir()
    monkeypatch.setattr(using, "TICKETS", str(tickets))
    read, write = ticket.read, ticket.write
    monkeypatch.setattr(ticket, "read", lambda container: read(container, str(tickets)))
    monkeypatch.setattr(ticket, "write", lambda made: write(made, str(tickets)))
    found = Store(str(tmp_path / "store"))
    found.open()
    return found


def put(store: Store, age: int, size: int = 100, name: str = "", namespace: str = "models") -> str:
    found = manifests.build(
        **fields(
            source={**SOURCE, "namespace": namespace},
            created_at=1000.0 - age,
            sizes={"criu": size, "rootfs": 0, "shm": 0, "memory": 0, "entries": 1},
            name=name,
        )
    )
    place = store.snapshots / found.id
    (place / "criu").mkdir(parents=True)
    (place / "manifest.json").write_bytes(found.encode())
    store.read_index()
    return found.id


def a_room(store: Store, *containers: Tracked, **config: Any) -> Room:
    registry = Registry()
    for each in containers:
        registry.add(each)
    chosen = replace(Config(), **{"keep_free_percent": 0.0, **config})
    return Room(chosen, store, registry, Reporter())


def a_container(wish: Wish, state: State = State.COLD, snapshot: str = "") -> Tracked:
    pod = Pod("models", "pod", "uid", "sandbox")
    return Tracked(ContainerId("abc"), "main", pod, wish, state=state, snapshot=snapshot)


async def _nothing() -> None:
    """Grows by nothing: the default copy."""


def captured(
    room: Room,
    estimated: int,
    real: int | None = None,
    grow: Callable[[], Awaitable[None]] = _nothing,
) -> None:
    async def run() -> None:
        async with room.reserved("c", "models", Amount(estimated, 1)):
            async with room.followed("c", "models"):
                await room.check("c", "models")
                await grow()
            await room.admit(
                "c", "models", Amount(estimated, 1),
                Amount(estimated if real is None else real, 1),
            )  # fmt: skip

    asyncio.run(run())


def left(store: Store) -> set[str]:
    again = Store(str(store.root))
    again.open()
    assert {each.id for each in again.all()} == {each.id for each in store.all()}
    return {each.id for each in store.all()}


def test_least_recently_used_snapshot_is_evicted_first(store: Store) -> None:
    oldest, older, new = put(store, 3), put(store, 2), put(store, 1)
    store.used(oldest)
    os.utime(store.root / "used" / oldest, (1500, 1500))
    captured(a_room(store, max_store_bytes=300), 100)
    assert left(store) == {oldest, new}, f"{older[:6]} was not used since it was made"


def test_snapshot_in_quarantine_is_evicted_before_useful_snapshots(store: Store) -> None:
    old, useless = put(store, 2), put(store, 1)
    store.quarantine.failed(useless, blame=Blame.CONTENT, error_class="", reason="", after=2)
    captured(a_room(store, max_store_bytes=200), 100)
    assert left(store) == {old}
    assert os.listdir(store.root / "quarantine") == []


@pytest.mark.parametrize(
    "use", ["mounted", "restoring", "ticket", "named", "id", "young", "comes back"]
)
def test_snapshot_in_use_or_with_a_ticket_stays(
    store: Store, use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = put(store, 1, name="warm")
    containers = []
    if use == "mounted":
        monkeypatch.setattr(using, "with_diff_mounted", lambda: {one: ["c"]})
    if use == "restoring":
        containers.append(a_container(Wish(), State.RESTORING, one))
    if use == "ticket":
        ticket.write(
            ticket.Ticket(
                container="abc", snapshot=one, fallback="cold", deadline_s=1, turns=1,
                turn_wait_s=1, turn_hold_s=60, pod_namespace="",
                pod_name="", pod_uid="", container_name="",
                resume="", gpu_pairs=[], others=0,
            )
        )  # fmt: skip
    if use == "named":
        containers.append(a_container(Wish(restore="warm"), State.CREATED))
    if use == "id":
        containers.append(a_container(Wish(restore=f"sha256:{one[:12]}"), State.CREATED))
    if use == "comes back":
        wish = Wish(restore="warm", on_restart="restore")
        containers.append(a_container(wish, State.RESTORED, one))
    if use == "young":
        store.used(one)
    with pytest.raises(NoRoom, match="max_store_bytes"):
        captured(a_room(store, *containers, max_store_bytes=150), 100)
    assert left(store) == {one}


@pytest.mark.parametrize(
    ("wish", "state", "namespace"),
    [
        (Wish(restore="warm"), State.COLD, "models"),
        (Wish(restore="warm", on_restart="restore"), State.COLD, "models"),
        (Wish(restore="warm"), State.CREATED, "other"),
        (Wish(restore="by id"), State.CREATED, "other"),
    ],
)
def test_container_that_only_names_a_snapshot_keeps_nothing(
    store: Store, wish: Wish, state: State, namespace: str
) -> None:
    one = put(store, 1, name="warm")
    wish = replace(wish, restore=wish.restore.replace("by id", f"sha256:{one}"))
    names = a_container(wish, state)
    names.pod = replace(names.pod, namespace=namespace)
    captured(a_room(store, names, max_store_bytes=150), 100)
    assert left(store) == set()


def test_capture_evicts_within_its_namespace_first(store: Store) -> None:
    theirs, own, newer = put(store, 9, namespace="other"), put(store, 2), put(store, 1)
    captured(a_room(store, max_store_bytes=300), 100)
    assert left(store) == {theirs, newer}, "theirs was not used for longer"
    captured(a_room(store, max_store_bytes=150), 50)
    assert left(store) == {theirs}
    with pytest.raises(NoRoom):
        captured(a_room(store, max_store_bytes=150), 100)
    assert left(store) == {theirs}, "more than a half is not for one of two"
    del own


def test_namespace_beyond_its_share_loses_snapshots(store: Store) -> None:
    theirs = [put(store, age, namespace="greedy") for age in (3, 2, 1)]
    captured(a_room(store, max_store_bytes=300), 100)
    assert left(store) == set(theirs[1:])
    with pytest.raises(NoRoom):
        captured(a_room(store, max_store_bytes=300, namespace_percent=70.0), 200)
    assert left(store) == set(theirs[1:]), "they have less than 70 percent"


def test_quota_of_a_namespace_evicts_only_its_own_snapshots(store: Store) -> None:
    theirs, own = put(store, 9, namespace="other"), put(store, 1)
    captured(a_room(store, max_namespace_bytes=150), 100)
    assert left(store) == {theirs}
    with pytest.raises(NoRoom, match=r"namespace models .* 151 bytes, max_namespace_bytes is 150"):
        captured(a_room(store, max_namespace_bytes=150), 151)
    assert own not in left(store)


def test_nothing_is_evicted_in_vain(store: Store) -> None:
    one = put(store, 1)
    with pytest.raises(NoRoom):
        captured(a_room(store, max_store_bytes=150), 200)
    with pytest.raises(NoRoom, match="evict = true"):
        captured(a_room(store, max_store_bytes=150, evict=False), 100)
    assert left(store) == {one}


def test_too_big_snapshot_is_refused_before_and_after_the_capture(store: Store) -> None:
    room = a_room(store, max_snapshot_bytes=100)
    with pytest.raises(SnapshotTooBig, match="will probably take 101"):
        captured(room, 101)
    with pytest.raises(SnapshotTooBig, match="takes 101"):
        captured(room, 50, 101)
    captured(room, 100)


def test_real_size_counts_and_reservations_end(store: Store) -> None:
    room = a_room(store, max_store_bytes=100)
    with pytest.raises(NoRoom):
        captured(room, 50, 101)
    captured(room, 100)
    captured(room, 100)  # the earlier reservation is free again


def test_simultaneous_captures_do_not_share_their_room(store: Store) -> None:
    room = a_room(store, max_store_bytes=150)

    async def run() -> None:
        async with room.reserved("a", "models", Amount(100, 1)):
            with pytest.raises(NoRoom):
                async with room.reserved("b", "models", Amount(100, 1)):
                    pass
            async with room.reserved("c", "models", Amount(50, 1)):
                pass

    asyncio.run(run())


def test_room_on_the_disk_is_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    one = put(store, 1, size=100)
    free = [1000]
    monkeypatch.setattr(rooms, "disk", lambda _: Disk(2000, free[0]))
    captured(a_room(store, keep_free_percent=10.0), 800)
    assert left(store) == {one}
    with pytest.raises(NoRoom, match="keep_free"):
        captured(a_room(store, keep_free_bytes=350), 800)
    assert left(store) == {one}
    free[0] = 240  # the new snapshot is on the disk
    captured(a_room(store, keep_free_bytes=250), 0, 0)
    assert left(store) == set()


@pytest.mark.parametrize(
    ("copied", "stays"), [(0, 3), (700, 3), (750, 3), (751, 2), (850, 2), (851, 1), (951, 0)]
)
def test_copy_evicts_only_for_what_it_has_written(
    store: Store, monkeypatch: pytest.MonkeyPatch, copied: int, stays: int
) -> None:
    """The capture fails in the end, and 1,050 bytes were estimated."""
    several = [put(store, age) for age in (1, 2, 3)]
    free = [1000]
    monkeypatch.setattr(rooms, "disk", lambda _: Disk(2000, free[0] + 100 * (3 - len(all_(store)))))
    monkeypatch.setattr(rooms, "_LOOK_S", 0.001)
    monkeypatch.setattr(rooms, "_FULL_BYTES", 0)

    async def grow() -> None:
        for written in range(0, copied + 1, 50):
            free[0] = 1000 - written
            await asyncio.sleep(0.01)
        free[0] = 1000 - copied
        await asyncio.sleep(0.05)
        raise CriuDumpFailed("cannot dump", about="c", why="why", do="Look.")

    with pytest.raises(CriuDumpFailed):
        captured(a_room(store, keep_free_bytes=250), 1050, grow=grow)
    assert left(store) == set(several[:stays]), "the oldest leave first"


def all_(store: Store) -> list[str]:
    return os.listdir(store.snapshots)


def test_others_that_fill_the_disk_evict_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk has less than its limit already, and another program writes to the disk."""
    one = put(store, 1)
    free = [240]
    monkeypatch.setattr(rooms, "disk", lambda _: Disk(2000, free[0]))
    monkeypatch.setattr(rooms, "_LOOK_S", 0.001)
    monkeypatch.setattr(rooms, "_FULL_BYTES", 0)

    async def others_write() -> None:
        await asyncio.sleep(0.05)
        assert left(store) == {one}, "no copy has grown yet"
        free[0] = 100
        await asyncio.sleep(0.05)
        raise CriuDumpFailed("cannot dump", about="c", why="why", do="Look.")

    with pytest.raises(CriuDumpFailed):
        captured(a_room(store, keep_free_bytes=250), 0, grow=others_write)
    assert left(store) == {one}


def test_copy_that_cannot_get_room_goes_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [1000]
    monkeypatch.setattr(rooms, "disk", lambda _: Disk(2000, free[0]))
    monkeypatch.setattr(rooms, "_LOOK_S", 0.001)

    async def grow() -> None:
        free[0] = 100
        await asyncio.sleep(0.05)

    with pytest.raises(NoRoom, match="keep_free"):
        captured(a_room(store, keep_free_bytes=250), 700, 900, grow=grow)


def test_full_disk_is_reported_as_no_room(store: Store) -> None:
    room = a_room(store)

    async def run() -> None:
        async with room.reserved("c", "models", Amount(1, 1)):
            error = CriuDumpFailed("cannot dump", about="c", why="write failed", do="Look.")
            raise error from OSError(28, "No space left on device")

    with pytest.raises(NoRoom, match=r"the disk is full.*write failed"):
        asyncio.run(run())


def test_other_failures_keep_their_error_class(store: Store) -> None:
    room = a_room(store)

    async def run() -> None:
        async with room.reserved("c", "models", Amount(1, 1)):
            raise CriuDumpFailed("cannot dump", about="c", why="why", do="Look.")

    with pytest.raises(CriuDumpFailed):
        asyncio.run(run())


def test_capture_that_never_happens_evicts_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon reserves room, and the capture fails before any copy."""
    one = put(store, 1, size=100)
    monkeypatch.setattr(rooms, "disk", lambda _: Disk(2000, 1000))

    async def run(room: Room) -> None:
        async with room.reserved("c", "models", Amount(950, 1)):
            await room.check("c", "models")

    for config in ({"max_store_bytes": 1000}, {"keep_free_bytes": 100}):
        asyncio.run(run(a_room(store, **config)))
    assert left(store) == {one}


def test_snapshot_smaller_than_its_estimate_evicts_nothing(store: Store) -> None:
    one = put(store, 1, size=100)
    captured(a_room(store, max_store_bytes=200), 150, 100)
    assert left(store) == {one}


def test_estimate_counts_memory_and_files(tmp_path: Path) -> None:
    held = bytearray(os.urandom(MIB) * 8)
    in_memory, _ = estimate.memory([os.getpid()])
    assert in_memory > len(held)
    assert estimate.memory([2**22 + 1]) == (0, 0), "a process that has ended has none"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(held)
    (tmp_path / "a" / "link").symlink_to("b")
    found = estimate.amount(str(tmp_path), Stop())
    assert 8 * MIB <= found.content_bytes < 9 * MIB
    assert found.entries == 3
    assert found.size_bytes == found.content_bytes + 3 * limits.ENTRY_BYTES


def test_an_estimate_has_deleted_files_that_are_open(tmp_path: Path) -> None:
    before = estimate.deleted([os.getpid()], Stop())
    path = tmp_path / "gone"
    with path.open("wb") as file:
        file.write(os.urandom(MIB))
        file.flush()
        assert estimate.deleted([os.getpid()], Stop()) == before, "it has a name"
        path.unlink()
        with open(os.dup(file.fileno()), "wb"):
            found = estimate.deleted([os.getpid(), os.getpid()], Stop()).less(before)
    assert (found.content_bytes, found.entries) == (MIB, 1)
    with open(os.memfd_create("x"), "wb") as file:
        file.write(bytes(MIB))
        assert estimate.deleted([os.getpid()], Stop()) == before, "it is memory"


def test_container_beyond_snapshot_limits_is_refused_before_any_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_ENTRIES", 3)
    monkeypatch.setattr(limits, "MAX_DEPTH", 2)
    (tmp_path / "a/b/c").mkdir(parents=True)
    with pytest.raises(limits.TooMuch, match="directories in each other"):
        estimate.amount(str(tmp_path), Stop())
    (tmp_path / "a/b/c").rmdir()
    for name in ("d", "e"):
        (tmp_path / name).touch()
    with pytest.raises(limits.TooMuch, match="3 at most"):
        estimate.amount(str(tmp_path), Stop())
    assert estimate.amount(str(tmp_path), Stop(), limited=False).entries == 4
    with pytest.raises(Stopped, match="deadline"):
        estimate.amount(str(tmp_path), Stop(0))


def test_snapshots_of_an_older_schema_are_evicted_first(store: Store) -> None:
    one, old = put(store, 1, size=100), put(store, 2, size=100)
    manifest = store.snapshots / old / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema": 5', '"schema": 4'))
    (store.snapshots / old / "data").write_bytes(bytes(50_000))
    store.read_index()
    assert "of an older quickthaw" in store.damaged[old]
    captured(a_room(store, max_store_bytes=10_000), 100)
    assert left(store) == {one}
    assert not (store.snapshots / old).exists()


def test_inodes_are_kept_free_like_bytes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, 1, size=100)
    free = [100]

    def there(_: object) -> Disk:
        evicted = 1 - len(all_(store))
        return Disk(10_000, 10_000, inodes=1000, free_inodes=free[0] + evicted)

    monkeypatch.setattr(rooms, "disk", there)
    monkeypatch.setattr(rooms, "_LOOK_S", 0.001)

    async def grow() -> None:
        free[0] = 99
        await asyncio.sleep(0.05)

    captured(a_room(store, keep_free_percent=10.0), 1, grow=grow)
    assert left(store) == set(), "the snapshot with one inode makes room for one"
    with pytest.raises(NoRoom, match=r"99 inodes of 1000 would be left free.*asks for 101"):
        captured(a_room(store, keep_free_percent=10.1), 1)
    monkeypatch.setattr(rooms, "disk", lambda _: Disk(10_000, 10_000, 0, 0))
    captured(a_room(store, keep_free_percent=10.1), 1)  # btrfs makes inodes on demand


def test_estimate_counts_shared_memory_once() -> None:
    held = bytearray(os.urandom(MIB) * 64)
    alone, _ = estimate.memory([os.getpid()])
    told, tell = os.pipe()
    children = []
    for _ in range(4):
        if not (child := os.fork()):
            os.close(tell)
            os.read(told, 1)
            os._exit(0)
        children.append(child)
    together, _ = estimate.memory([os.getpid(), *children])
    os.close(tell)
    os.close(told)
    for child in children:
        os.waitpid(child, 0)
    assert len(held) < together < alone + 32 * MIB
