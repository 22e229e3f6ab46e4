"""A complete directory becomes a snapshot, wherever it was made; an incomplete one does not."""

from __future__ import annotations

import json
import math
import shutil
from typing import TYPE_CHECKING

import pytest

from shim.contract import manifest
from shim.contract.errors import NotPublished
from shim.integrity import marks
from shim.integrity.check import SnapshotCheck
from shim.kernel.beneath import open_dir
from shim.kernel.stopping import Stop, Stopped
from shim.store import complete
from shim.store.store import Store
from tests.unit.manifests import fields

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from shim.contract.manifest import Manifest


def signed_elsewhere(found: Manifest) -> bytes:
    return f"another node signed {found.id}".encode()


def refuse(_: Manifest) -> bytes:
    raise AssertionError("a snapshot that was made elsewhere is not signed again")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(str(tmp_path / "store"), sign=refuse, marks_directory=str(tmp_path / "marks"))
    made.open()
    return made


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A complete directory that another node has made, digested and signed."""
    place = tmp_path / "elsewhere"
    for part in ("criu", "rootfs"):
        (place / part).mkdir(parents=True)
    (place / "criu/inventory.img").write_bytes(b"inventory")
    (place / "rootfs/motd").write_text("hello")
    recorded = complete.digest(place, Stop())
    found = manifest.build(**fields(files=tuple(recorded.files)))
    complete.sign(place, found, signed_elsewhere)
    return place


def brought(store: Store, elsewhere: Path) -> Path:
    staged = store.begin()
    shutil.copytree(elsewhere, staged, dirs_exist_ok=True)
    staged.chmod(0o700)
    return staged


def test_directory_that_another_node_completed_exists_after_place(
    store: Store, elsewhere: Path
) -> None:
    found = store.place(brought(store, elsewhere))
    assert store.get(found.id) == found
    assert store.signature_of(found.id) == signed_elsewhere(found)
    assert not list(store.staging.iterdir())
    with (
        open_dir(str(store.snapshots / found.id)) as place,
        SnapshotCheck(
            place.fileno(), found, container="c1", until=math.inf, with_marks=False
        ) as check,
    ):
        check.begin()
        check.finish()
    again = Store(str(store.root))
    again.open()
    assert (again.all(), again.signature_of(found.id)) == ([found], signed_elsewhere(found))


def test_place_writes_marks_only_of_files_that_the_caller_hashed(
    store: Store, elsewhere: Path, tmp_path: Path
) -> None:
    directory = str(tmp_path / "marks")
    found = store.place(brought(store, elsewhere))
    assert marks.read(found.id, "rootfs", directory) == {}
    store.remove(found.id, users=[])
    staged = brought(store, elsewhere)
    store.place(staged, {"rootfs": {"": [7]}})
    assert marks.read(found.id, "rootfs", directory) == {"": [7]}


def _change(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"name": "other"}))


def _make_link(path: Path) -> None:
    path.rename(path.with_name("m"))
    path.symlink_to("m")


def _make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _empty(path: Path) -> None:
    path.write_bytes(b"")


DEFECTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "no manifest": ("manifest.json", lambda path: path.unlink()),
    "a changed manifest": ("manifest.json", _change),
    "a link in the manifest's place": ("manifest.json", _make_link),
    "no signature": ("manifest.sig", lambda path: path.unlink()),
    "a directory as the signature": ("manifest.sig", _make_directory),
    "no listing": ("shm.tree", lambda path: path.unlink()),
    "a shorter listing": ("criu.tree", _empty),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_incomplete_directory_does_not_become_a_snapshot(
    store: Store, elsewhere: Path, defect: str
) -> None:
    staged = brought(store, elsewhere)
    name, damage = DEFECTS[defect]
    damage(staged / name)
    with pytest.raises(NotPublished):
        store.place(staged)
    assert not list(store.snapshots.iterdir())
    assert store.all() == []
    store.discard(staged)
    assert not list(store.staging.iterdir())


def test_snapshot_that_exists_already_stays_when_it_comes_again(
    store: Store, elsewhere: Path
) -> None:
    found = store.place(brought(store, elsewhere))
    second = brought(store, elsewhere)
    with pytest.raises(NotPublished):
        store.place(second)
    store.discard(second)
    assert store.all() == [found]


def test_place_can_be_stopped_until_the_snapshot_exists(store: Store, elsewhere: Path) -> None:
    stop = Stop()
    stop.tell()
    with pytest.raises(Stopped):
        store.place(brought(store, elsewhere), stop=stop)
    assert store.all() == []
    assert not list(store.snapshots.iterdir())
