"""/dev/shm goes into a snapshot and comes back, on a real tmpfs."""

from __future__ import annotations

import mmap
import os
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings

from shim.contract.errors import ShmNotFilled
from shim.kernel import filesystem, mounts
from shim.kernel.beneath import empty_dir, open_dir
from shim.kernel.filesystem import punch_hole
from shim.kernel.stopping import Stop, Stopped
from shim.shm import filecopy, fill, precopy
from shim.shm.devshm import ShmCopy
from tests.unit import rootfs_trees as trees

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

Steps = list[tuple[str, str, str, int]]


@pytest.fixture
def pods(tmp_path: Path) -> Iterator[Path]:
    """Makes `old` and `new`, the /dev/shm of two pods, beside a `snapshot` on disk."""
    with trees.own_mounts(tmp_path):
        for pod in trees.make_dirs(tmp_path, "old", "new", "snapshot")[:2]:
            mounts.mount("shm", pod, "tmpfs", 0, "mode=1777")
        yield tmp_path


def _capture(pods: Path, changed: Callable[[], object] = bool) -> str:
    """changed: called between the pre-copy and the copy of the frozen container."""
    snapshot = f"{pods}/snapshot"
    until = time.monotonic() + 60
    with ShmCopy(f"{pods}/old", snapshot, container="c", stop=Stop(until)) as copy:
        copy.precopy()
        changed()
        copy.finish()
    return snapshot


def _fill(snapshot: str, target: str) -> list[str]:
    put = fill.plan(snapshot, target, container="c")
    fill.build(snapshot, target, put, container="c")
    fill.place(target, put, container="c")
    return put


def _undo(target: str, put: list[str], *, placed: bool = True) -> None:
    fill.undo(target, put, container="c", placed=placed)


@settings(max_examples=40, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(steps=trees.changes)
def test_content_of_shm_comes_back_and_undo_removes_it(pods: Path, steps: Steps) -> None:
    old, new = f"{pods}/old", f"{pods}/new"
    trees.change(old, [("mkdir", name, "", 0o55) for name in trees.DIRS])
    trees.change(old, [step for step in steps if step[0] != "device"])
    snapshot = _capture(pods)
    put = _fill(snapshot, new)
    wanted, got = trees.view(old), trees.view(new)
    assert {k: v for k, v in got.items() if k != "."} == {
        k: v for k, v in wanted.items() if k != "."
    }
    assert fill.plan(snapshot, new, container="c") == []
    _undo(new, put)
    _undo(new, put)
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


def test_equal_file_of_another_container_is_kept(pods: Path) -> None:
    for place in ("old", "new"):
        os.mkdir(f"{pods}/{place}/d")
        (pods / place / "d" / "same").write_bytes(b"s")
    (pods / "old" / "d" / "more").write_bytes(b"m")
    put = _fill(_capture(pods), f"{pods}/new")
    assert put == ["d/more"]
    _undo(f"{pods}/new", put)
    assert os.listdir(f"{pods}/new/d") == ["same"]


@pytest.mark.parametrize("theirs", [b"other", b"short", b"x" * 9])
def test_different_file_stops_the_swap_and_stays(pods: Path, theirs: bytes) -> None:
    (pods / "old" / "f").write_bytes(b"ours!")
    (pods / "new" / "f").write_bytes(theirs)
    snapshot = _capture(pods)
    with pytest.raises(ShmNotFilled, match="f exists"):
        fill.plan(snapshot, f"{pods}/new", container="c")
    assert (pods / "new" / "f").read_bytes() == theirs


def test_a_symlink_of_the_pod_leads_nowhere(pods: Path) -> None:
    os.mkdir(f"{pods}/old/d")
    (pods / "old" / "d" / "f").write_bytes(b"f")
    os.mkdir(f"{pods}/outside")
    os.symlink(f"{pods}/outside", f"{pods}/new/d")
    snapshot = _capture(pods)
    with pytest.raises(ShmNotFilled):
        fill.plan(snapshot, f"{pods}/new", container="c")
    fill.build(snapshot, f"{pods}/new", ["d/f"], container="c")
    with pytest.raises(ShmNotFilled):
        fill.place(f"{pods}/new", ["d/f"], container="c")
    assert os.listdir(f"{pods}/outside") == []
    _undo(f"{pods}/new", ["d/f"])
    assert os.listdir(f"{pods}/new") == ["d"]


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


def _rewrite(path: str) -> None:
    with open(path, "r+b") as file:
        file.seek((9 << 20) - 3)
        file.write(os.urandom(5))


def _rewrite_mapped(path: str) -> None:
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[5000] ^= 1
        mapped[-1] ^= 1


def _punch(path: str) -> None:
    with open(path, "r+b") as file:
        punch_hole(file.fileno(), 1 << 20, 3 << 20)


def _shorten(path: str) -> None:
    os.truncate(path, (2 << 20) + 3)
    os.truncate(path, 30 << 20)


def _lengthen(path: str) -> None:
    with open(path, "ab") as file:
        file.write(os.urandom((9 << 20) + 1))


def _replace(path: str) -> None:
    os.unlink(path)
    with open(path, "wb") as file:
        file.write(os.urandom(10 << 20))


def _rename(path: str) -> None:
    os.mkdir(f"{path}.d", 0o755)
    os.rename(path, f"{path}.d/moved")


def _link(path: str) -> None:
    os.link(path, f"{path}.too")


def _be_small(path: str) -> None:
    os.truncate(path, 3)


def _own(path: str) -> None:
    os.chown(path, 5, 6)
    os.chmod(path, 0o4711)  # noqa: S103
    os.setxattr(path, "trusted.of", b"it")


@pytest.mark.parametrize(
    "change",
    [bool, _rewrite, _rewrite_mapped, _punch, _shorten, _lengthen, _replace, _rename, _link,
     _be_small, _own, os.unlink],
)  # fmt: skip
def test_copy_of_a_big_file_is_exact_whatever_happens_to_the_file(
    pods: Path, change: Callable[[str], object]
) -> None:
    path = f"{pods}/old/big"
    with open(path, "wb") as file:
        file.write(os.urandom(20 << 20))
        file.truncate(30 << 20)
        file.seek(26 << 20)
        file.write(os.urandom((3 << 20) + 7))
    snapshot = _capture(pods, lambda: change(path))
    assert trees.view(snapshot) == trees.view(f"{pods}/old")
    for name, _, files in os.walk(f"{pods}/old"):
        for each in files:
            old = f"{name}/{each}"
            kept = old.replace("/old/", "/snapshot/", 1)
            assert os.stat(kept).st_blocks <= os.stat(old).st_blocks + 8, "holes are kept"
            assert os.stat(kept).st_nlink == os.stat(old).st_nlink


def test_precopied_content_is_compared_and_not_written_again(
    pods: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"{pods}/old/big"
    with open(path, "wb") as file:
        file.write(os.urandom(20 << 20))
    written: list[int] = []
    write = filesystem.write_at

    def counted(fd: int, view: memoryview, offset: int) -> None:
        written.append(offset)
        write(fd, view, offset)

    def change() -> None:
        assert len(written) == 40
        written.clear()
        _rewrite(path)

    monkeypatch.setattr(precopy, "write_at", counted)
    _capture(pods, change)
    assert sorted(written) == [(9 << 20) - (512 << 10), 9 << 20]


def test_big_files_beyond_the_precopy_limit_are_copied(
    pods: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precopy, "_MOST_FILES", 2)
    for number in range(4):
        with open(f"{pods}/old/{number}", "wb") as file:
            file.write(os.urandom(8 << 20))
    open_before = len(os.listdir("/proc/self/fd"))
    held: list[int] = []
    snapshot = _capture(pods, lambda: held.append(len(os.listdir("/proc/self/fd")) - open_before))
    assert trees.view(snapshot) == trees.view(f"{pods}/old")
    assert held == [2 + 1], "two copies and the directory"
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_file_with_very_many_islands_of_data_is_copied(
    pods: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filecopy, "_MOST_RANGES", 1000)
    monkeypatch.setattr(precopy, "_MOST_PIECES", 3000)
    path = f"{pods}/old/islands"
    with open(path, "wb") as file:
        for at in range(0, 40 << 20, 8192):
            os.pwrite(file.fileno(), os.urandom(4096), at)

    def change() -> None:
        with open(path, "r+b") as file:
            for at in range(4 << 20, 7 << 20, 8192):
                punch_hole(file.fileno(), at, 4096)
            os.pwrite(file.fileno(), b"x" * 4096, (20 << 20) + 4096)

    snapshot = _capture(pods, change)
    put = _fill(snapshot, f"{pods}/new")
    assert put == ["islands"]
    assert trees.view(snapshot) == trees.view(f"{pods}/old")
    for place in ("snapshot", "new"):
        there = os.stat(f"{pods}/{place}/islands").st_blocks
        # A file system on disk takes blocks for the list of so many pieces, too.
        assert there <= os.stat(path).st_blocks + 1024, "20 MiB of holes are kept"


def test_slow_copy_is_a_failure(pods: Path) -> None:
    with open(f"{pods}/old/big", "wb") as file:
        file.write(os.urandom(8 << 20))
    with ShmCopy(f"{pods}/old", f"{pods}/snapshot", container="c", stop=Stop(0)) as copy:
        for step in (copy.precopy, copy.finish):
            with pytest.raises(Stopped, match="past its deadline"):
                step()


def test_too_small_tmpfs_is_reported_and_left_unchanged(pods: Path) -> None:
    with open(f"{pods}/old/big", "wb") as file:
        file.write(os.urandom(16 << 20))
    snapshot = _capture(pods)
    small = trees.make_dirs(pods, "small")[0]
    mounts.mount("shm", small, "tmpfs", 0, "mode=1777,size=8m")
    put = fill.plan(snapshot, small, container="c")
    with pytest.raises(ShmNotFilled, match="No space left"):
        fill.build(snapshot, small, put, container="c")
    _undo(small, put, placed=False)
    assert os.listdir(small) == []


def test_links_of_a_neighbour_do_not_make_the_undo_fail(pods: Path) -> None:
    for name in ("a", "d"):
        os.mkdir(f"{pods}/old/{name}")
        (pods / "old" / name / "f").write_bytes(b"f")
    (pods / "old" / "last").write_bytes(b"f")
    put = _fill(_capture(pods), f"{pods}/new")
    outside = pods / "outside"
    outside.mkdir()
    (outside / "f").write_bytes(b"the node's")
    os.rename(f"{pods}/new/d", f"{pods}/new/theirs")
    os.symlink(outside, f"{pods}/new/d")
    os.symlink(outside, f"{pods}/new/.quickthaw.c")
    _undo(f"{pods}/new", put)
    assert os.listdir(outside) == ["f"]
    assert sorted(os.listdir(f"{pods}/new")) == [".quickthaw.c", "theirs"]


def test_what_a_neighbour_puts_into_the_private_directory_stays(pods: Path) -> None:
    (pods / "old" / "f").write_bytes(b"f")
    target = f"{pods}/new"
    snapshot = _capture(pods)
    fill.build(snapshot, target, ["f"], container="c")
    (pods / "new/.quickthaw.c/theirs").write_bytes(b"x")
    _undo(target, ["f"], placed=False)
    assert os.listdir(f"{target}/.quickthaw.c") == ["theirs"]
