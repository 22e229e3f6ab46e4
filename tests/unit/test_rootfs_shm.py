"""/dev/shm goes into a snapshot and comes back, on a real tmpfs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings

from shim.contract.errors import ShmNotFilled
from shim.kernel import mounts
from shim.kernel.beneath import empty_dir, open_dir
from shim.rootfs import devshm, shmfill
from tests.unit import rootfs_trees as trees

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Steps = list[tuple[str, str, str, int]]


@pytest.fixture
def pods(tmp_path: Path) -> Iterator[Path]:
    """`old` and `new` are the /dev/shm of two pods, beside a `snapshot` on disk."""
    with trees.own_mounts(tmp_path):
        for pod in trees.make_dirs(tmp_path, "old", "new", "snapshot")[:2]:
            mounts.mount("shm", pod, "tmpfs", 0, "mode=1777")
        yield tmp_path


def _capture(pods: Path) -> str:
    snapshot = f"{pods}/snapshot"
    with open_dir(f"{pods}/old") as old:
        devshm.capture(old.fileno(), snapshot, container="c")
    return snapshot


def _fill(snapshot: str, target: str) -> list[str]:
    put = shmfill.plan(snapshot, target, container="c")
    shmfill.fill(snapshot, target, put, container="c")
    return put


@settings(max_examples=40, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(steps=trees.changes)
def test_what_was_in_shm_comes_back_and_undo_takes_it_away(pods: Path, steps: Steps) -> None:
    old, new = f"{pods}/old", f"{pods}/new"
    trees.change(old, [("mkdir", name, "", 0o55) for name in trees.DIRS])
    trees.change(old, steps)
    snapshot = _capture(pods)
    put = _fill(snapshot, new)
    wanted, got = trees.view(old), trees.view(new)
    assert {k: v for k, v in got.items() if k != "."} == {
        k: v for k, v in wanted.items() if k != "."
    }
    assert shmfill.plan(snapshot, new, container="c") == []
    shmfill.undo(new, put)
    shmfill.undo(new, put)
    assert os.listdir(new) == []
    for place in (old, snapshot):
        with open_dir(place) as directory:
            empty_dir(directory.fileno())


def test_sparse_files_stay_sparse_and_exactly_as_long(pods: Path) -> None:
    with open(f"{pods}/old/ring", "wb") as file:
        file.truncate((64 << 20) + 3)
        file.seek(32 << 20)
        file.write(b"island")
    _fill(_capture(pods), f"{pods}/new")
    for place in ("snapshot", "new"):
        status = os.stat(f"{pods}/{place}/ring")
        assert status.st_size == (64 << 20) + 3
        assert status.st_blocks * 512 < 1 << 20


def test_what_another_container_put_there_is_left_when_it_is_the_same(pods: Path) -> None:
    for place in ("old", "new"):
        os.mkdir(f"{pods}/{place}/d")
        (pods / place / "d" / "same").write_bytes(b"s")
    (pods / "old" / "d" / "more").write_bytes(b"m")
    put = _fill(_capture(pods), f"{pods}/new")
    assert put == ["d/more"]
    shmfill.undo(f"{pods}/new", put)
    assert os.listdir(f"{pods}/new/d") == ["same"]


@pytest.mark.parametrize("theirs", [b"other", b"short", b"x" * 9])
def test_what_differs_stops_the_swap_and_stays(pods: Path, theirs: bytes) -> None:
    (pods / "old" / "f").write_bytes(b"ours!")
    (pods / "new" / "f").write_bytes(theirs)
    snapshot = _capture(pods)
    with pytest.raises(ShmNotFilled, match="f exists"):
        shmfill.plan(snapshot, f"{pods}/new", container="c")
    assert (pods / "new" / "f").read_bytes() == theirs


def test_a_symlink_of_the_pod_leads_nowhere(pods: Path) -> None:
    os.mkdir(f"{pods}/old/d")
    (pods / "old" / "d" / "f").write_bytes(b"f")
    os.mkdir(f"{pods}/outside")
    os.symlink(f"{pods}/outside", f"{pods}/new/d")
    snapshot = _capture(pods)
    with pytest.raises(ShmNotFilled):
        shmfill.plan(snapshot, f"{pods}/new", container="c")
    with pytest.raises(ShmNotFilled):
        shmfill.fill(snapshot, f"{pods}/new", ["d/f"], container="c")
    assert os.listdir(f"{pods}/outside") == []


@pytest.mark.parametrize("size", [(8 << 20) - 1, 8 << 20, (21 << 20) + 4097])
def test_a_big_file_comes_back_to_the_last_byte_and_keeps_its_holes(pods: Path, size: int) -> None:
    content = os.urandom(size)
    with open(f"{pods}/old/big", "wb") as file:
        file.write(content)
        file.truncate(size + (9 << 20) + 5)
        file.seek(size + (5 << 20))
        file.write(b"island")
    _fill(_capture(pods), f"{pods}/new")
    with open(f"{pods}/old/big", "rb") as old, open(f"{pods}/new/big", "rb") as new:
        assert new.read() == old.read()
    status = os.stat(f"{pods}/new/big")
    assert status.st_blocks * 512 <= -(-size // 4096) * 4096 + 8192


def test_a_tmpfs_that_is_too_small_is_told_and_left_as_it_was(pods: Path) -> None:
    with open(f"{pods}/old/big", "wb") as file:
        file.write(os.urandom(16 << 20))
    snapshot = _capture(pods)
    small = trees.make_dirs(pods, "small")[0]
    mounts.mount("shm", small, "tmpfs", 0, "mode=1777,size=8m")
    put = shmfill.plan(snapshot, small, container="c")
    with pytest.raises(ShmNotFilled, match="No space left"):
        shmfill.fill(snapshot, small, put, container="c")
    shmfill.undo(small, put)
    assert os.listdir(small) == []
