"""The copy of a writable layer shows the same merged tree, on real overlayfs."""

from __future__ import annotations

import itertools
import os
import shutil
import stat
import threading
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shim.contract.errors import RootfsNotCopied, SnapshotTooBig
from shim.kernel.beneath import empty_dir, open_dir
from shim.kernel.stopping import Stop, Stopped
from shim.rootfs import diff
from shim.rootfs.diff import DiffCopy
from tests.unit import rootfs_trees as trees

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_numbers = itertools.count()
Steps = list[tuple[str, str, str, int]]
generated = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    with trees.own_mounts(tmp_path) as path:
        yield path


def _image(place: Path, lower: Steps, higher: Steps) -> list[str]:
    """Makes two layers of an image, the second made through overlayfs too. The topmost first."""
    first, second, work = trees.make_dirs(place, "image1", "image2", "image-work")
    for name in trees.DIRS:
        os.makedirs(f"{first}/{name}", exist_ok=True)
    for name in trees.NAMES:
        if name not in trees.DIRS:
            trees.change(first, [("write", name, "", 7)])
    trees.change(first, lower)
    with trees.overlay(str(place / "build"), [first], second, work) as built:
        trees.change(built, higher)
    return [second, first]


def copied_whole(layers: list[str], target: str, base: list[str]) -> None:
    """Copies the layers of a container that is stopped, in a single pass."""
    with DiffCopy(layers, target, container="c", base=base) as it:
        it.finish()


@generated
@given(
    image=st.tuples(trees.changes, trees.changes),
    lives=st.lists(trees.changes, min_size=1, max_size=3),
)
def test_next_container_sees_the_changes_of_each_earlier_life(
    scratch: Path, image: tuple[Steps, Steps], lives: list[Steps]
) -> None:
    place = scratch / str(next(_numbers))
    base = _image(place, *image)
    diffs: list[str] = []
    for number, steps in enumerate(lives):
        upper, work, copy = trees.make_dirs(place, f"u{number}", f"w{number}", f"d{number}")
        lowerdirs = [*diffs[:1], *base]
        with trees.overlay(str(place / "m"), lowerdirs, upper, work) as merged:
            trees.change(merged, steps)
            before = trees.view(merged, link_counts=not diffs)
            copied_whole([upper, *diffs[:1]], copy, base)
        with trees.overlay(str(place / "m"), [copy, *base]) as merged:
            assert trees.view(merged, link_counts=not diffs) == before
        diffs.insert(0, copy)


@generated
@given(image=trees.changes, early=trees.changes, late=trees.changes, latest=trees.changes)
def test_precopy_and_finish_equal_a_plain_copy(
    scratch: Path, image: Steps, early: Steps, late: Steps, latest: Steps
) -> None:
    place = scratch / str(next(_numbers))
    base = _image(place, image, [])
    upper, work, copy = trees.make_dirs(place, "u", "w", "d")
    with (
        pytest.MonkeyPatch.context() as patch,
        trees.overlay(str(place / "m"), base, upper, work) as merged,
        DiffCopy([upper], copy, container="c") as it,
    ):
        patch.setattr(diff, "_SETTLED_NS", 0)  # or everything here would be copied again
        for steps in (early, late, latest):
            trees.change(merged, steps)
            time.sleep(0.011)  # a tick of the slowest kernel's clock
            it.precopy() if steps is not latest else it.finish()
        before = trees.view(merged)
    with trees.overlay(str(place / "m"), [copy, *base]) as merged:
        assert trees.view(merged) == before


@pytest.fixture
def layer(scratch: Path) -> Path:
    """Returns an upperdir that no overlay is mounted on: a test can set marks by hand."""
    trees.make_dirs(scratch, "u", "d")
    return scratch / "u"


def _copy(scratch: Path, *layers: str, userxattr: bool = False) -> None:
    sources = [f"{scratch}/{layer}" for layer in layers or ("u",)]
    with DiffCopy(sources, f"{scratch}/d", container="c", userxattr=userxattr) as it:
        it.finish()


def test_marks_of_overlayfs_stay_and_marks_of_a_nested_overlay_travel(
    scratch: Path, layer: Path
) -> None:
    (layer / "d").mkdir()
    for name in ("opaque", "origin", "impure", "uuid", "nlink", "protattr", "overlay.opaque"):
        os.setxattr(layer / "d", f"trusted.overlay.{name}", b"y")
    os.setxattr(layer / "d", "user.overlay.opaque", b"y")
    _copy(scratch)
    assert sorted(os.listxattr(scratch / "d/d")) == [
        "trusted.overlay.opaque", "trusted.overlay.overlay.opaque", "user.overlay.opaque",
    ]  # fmt: skip


def test_userxattr_overlays_use_other_marks(scratch: Path, layer: Path) -> None:
    (layer / "d").mkdir()
    os.setxattr(layer / "d", "user.overlay.opaque", b"y")
    os.setxattr(layer / "d", "user.overlay.origin", b"y")
    _copy(scratch, userxattr=True)
    assert os.listxattr(scratch / "d/d") == ["user.overlay.opaque"]


def test_attribute_whose_name_is_not_utf8_travels(scratch: Path, layer: Path) -> None:
    (layer / "f").touch()
    os.setxattr(layer / "f", b"user.\xff\xfe", b"v")
    _copy(scratch)
    assert os.getxattr(scratch / "d/f", b"user.\xff\xfe") == b"v"


@pytest.mark.parametrize("mark", ["metacopy", "redirect"])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_layer_that_is_no_whole_copy_is_refused(
    scratch: Path, layer: Path, mark: str, kind: str
) -> None:
    (layer / "x").mkdir() if kind == "directory" else (layer / "x").touch()
    os.setxattr(layer / "x", f"trusted.overlay.{mark}", b"")
    with pytest.raises(RootfsNotCopied, match=mark):
        _copy(scratch)


def test_whiteout_files_become_whiteout_devices(scratch: Path, layer: Path) -> None:
    for directory in ("x", "plain"):
        (layer / directory).mkdir()
        (layer / directory / "f").touch()
        os.setxattr(layer / directory / "f", "trusted.overlay.whiteout", b"")
    os.setxattr(layer / "x", "trusted.overlay.opaque", b"x")
    _copy(scratch)
    whiteout = os.stat(scratch / "d/x/f")
    assert (stat.S_IFMT(whiteout.st_mode), whiteout.st_rdev) == (stat.S_IFCHR, 0)
    assert stat.S_ISREG(os.stat(scratch / "d/plain/f").st_mode)
    assert os.listxattr(scratch / "d/x") == []


def test_access_times_are_copied_and_not_changed(scratch: Path, layer: Path) -> None:
    (layer / "d").mkdir()
    (layer / "d/f").write_bytes(b"x" * 300_000)
    (layer / "d/l").symlink_to("f")
    paths = ("d/f", "d/l", "d", ".")
    for number, path in enumerate(paths):
        os.utime(layer / path, ns=(number, 10 + number), follow_symlinks=False)
    _copy(scratch)
    for root in ("u", "d"):
        for number, path in enumerate(paths):
            if (root, path) == ("u", "d/l"):
                continue  # no readlink leaves the access time alone
            status = os.lstat(scratch / root / path)
            assert (status.st_atime_ns, status.st_mtime_ns) == (number, 10 + number), (root, path)


def test_holes_cost_nothing(scratch: Path, layer: Path) -> None:
    with open(layer / "f", "wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(b"island")
    _copy(scratch)
    status = os.stat(scratch / "d/f")
    assert (status.st_size, status.st_blocks * 512 < 1 << 20) == (1 << 40, True)


def _empty(directory: Path) -> None:
    with open_dir(str(directory)) as dirfd:
        empty_dir(dirfd.fileno())


def test_file_that_a_snapshot_cannot_hold_is_refused(
    scratch: Path, layer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (layer / "/".join("d" * 250)).mkdir(parents=True)
    with pytest.raises(SnapshotTooBig, match="directories in each other: a snapshot holds 200"):
        _copy(scratch)
    shutil.rmtree(layer / "d")
    _empty(scratch / "d")
    path = os.open(layer, os.O_RDONLY)
    for _ in range(16):  # by steps: the whole path is longer than the kernel takes
        os.mkdir("d" * 250, dir_fd=path)
        path, above = os.open("d" * 250, os.O_RDONLY, dir_fd=path), path
        os.close(above)
    os.close(path)
    with pytest.raises(SnapshotTooBig, match="bytes of path"):
        _copy(scratch)
    for directory in (layer, scratch / "d"):
        _empty(directory)
    monkeypatch.setattr(diff, "MAX_ENTRIES", 10)
    for number in range(11):
        (layer / f"{number}").touch()
    with pytest.raises(SnapshotTooBig, match="files and directories"):
        _copy(scratch)


def test_stopped_copy_ends_at_the_next_entry(scratch: Path, layer: Path) -> None:
    for number in range(10):
        (layer / f"{number}").touch()
    stop = Stop()
    with DiffCopy([str(layer)], f"{scratch}/d", container="c", stop=stop) as it:
        stop.tell()
        with pytest.raises(Stopped, match="stopped the work"):
            it.precopy()
    assert os.listdir(scratch / "d") == []


def test_walk_finds_the_names_of_inodes(scratch: Path, layer: Path) -> None:
    (layer / "deep/er").mkdir(parents=True)
    for name in ("a", "deep/er/b", "c"):
        (layer / name).write_text(name)
    inodes = [os.stat(layer / name).st_ino for name in ("a", "deep/er/b")]
    with DiffCopy([str(layer)], f"{scratch}/d", container="c") as it:
        it.precopy()
        it.finish(wanted=[*inodes, 12345678901])
    assert it.names == dict(zip(inodes, ("a", "deep/er/b"), strict=True))


def test_mapped_file_is_copied_whatever_its_times(
    scratch: Path, layer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diff, "_SETTLED_NS", 0)
    (layer / "d").mkdir()
    for name in ("by_inode", "d/by_path", "d/forgotten"):
        (layer / name).write_bytes(b"old")
    os.link(layer / "d/by_path", layer / "a_link")
    (layer / "out").symlink_to("/")
    time.sleep(0.011)
    with DiffCopy([str(layer)], f"{scratch}/d", container="c") as it:
        it.precopy()
        for name in ("by_inode", "d/by_path", "d/forgotten"):
            (scratch / "d" / name).write_bytes(b"???")  # as if a mapping had changed the source
        inode = os.stat(layer / "by_inode")
        stats = it.finish({(inode.st_dev, inode.st_ino)}, ["/d/by_path", "/not/there", "/out/x"])
    assert stats.files == 2
    copied = {name: (scratch / "d" / name).read_bytes()
              for name in ("by_inode", "d/by_path", "a_link", "d/forgotten")}  # fmt: skip
    assert copied == {
        "by_inode": b"old",
        "d/by_path": b"old",
        "a_link": b"old",
        "d/forgotten": b"???",
    }
    assert os.path.samefile(scratch / "d/a_link", scratch / "d/d/by_path")


def test_name_that_changes_during_the_copy_leads_nowhere(scratch: Path, layer: Path) -> None:
    """A directory, a symlink out, a device and a fifo take turns at one name during pre-copy."""
    (scratch / "secret").mkdir()
    (scratch / "secret/s").write_bytes(b"of the host")
    stop = threading.Event()
    name = layer / "x"

    def turn() -> None:
        while not stop.is_set():
            name.mkdir()
            (name / "s").write_bytes(b"of the container")
            name.rename(layer / "y")
            name.symlink_to("../secret")
            name.unlink()
            os.mkfifo(name)
            name.unlink()
            os.mknod(name, stat.S_IFCHR | 0o600, os.makedev(1, 5))
            name.unlink()
            (layer / "y/s").unlink()
            (layer / "y").rmdir()

    thread = threading.Thread(target=turn)
    thread.start()
    try:
        with DiffCopy([str(layer)], f"{scratch}/d", container="c") as it:
            for _ in range(300):
                it.precopy()
                for root, _, files in os.walk(scratch / "d"):
                    for file in files:
                        path = f"{root}/{file}"
                        if stat.S_ISREG(os.lstat(path).st_mode):
                            with open(path, "rb") as copied:
                                assert copied.read() in (b"", b"of the container")
            stop.set()
            thread.join()
            it.finish()
    finally:
        stop.set()
        thread.join()
    assert trees.view(str(layer)) == trees.view(f"{scratch}/d")


def test_finish_is_exact_after_writers_during_precopy(scratch: Path) -> None:
    base = _image(scratch, [], [])
    upper, work, copy = trees.make_dirs(scratch, "u", "w", "d")
    stop = threading.Event()
    random = trees.random_steps(seed=1)

    with (
        trees.overlay(str(scratch / "m"), base, upper, work) as merged,
        DiffCopy([upper], copy, container="c") as it,
    ):

        def write() -> None:
            while not stop.is_set():
                trees.change(merged, [next(random)])

        thread = threading.Thread(target=write)
        thread.start()
        try:
            for _ in range(30):
                it.precopy()
        finally:
            stop.set()
            thread.join()
        it.finish()
        before = trees.view(merged)
    with trees.overlay(str(scratch / "m"), [copy, *base]) as merged:
        assert trees.view(merged) == before
