"""A snapshot is used only when every byte and every attribute is as published."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from shim.contract.errors import SnapshotNotWhole
from shim.contract.limits import TooMuch
from shim.integrity import chunks, content, marks, tree
from shim.integrity.tree import Line
from shim.integrity.work import Work
from shim.kernel import filesystem
from shim.kernel.beneath import open_dir
from shim.kernel.process import TooLate
from tests.unit.snapshots import MIB, check, checking, make_parts, recorded

if TYPE_CHECKING:
    from collections.abc import Callable

    from shim.contract.manifest import Manifest

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="device nodes and owners need root")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """Returns a snapshot that no test may change, unless the test puts it back."""
    place = tmp_path_factory.mktemp("whole")
    make_parts(place)
    return place, recorded(place)[0]


@pytest.fixture
def own(whole: tuple[Path, Manifest], tmp_path: Path) -> tuple[Path, Manifest]:
    """Returns a copy that a test may damage."""
    place = tmp_path / "snapshot"
    shutil.copytree(whole[0], tmp_path / "none", symlinks=True, ignore=lambda _, names: names)
    make_parts(place)
    return place, recorded(place)[0]


def test_untouched_snapshot_is_whole(whole: tuple[Path, Manifest]) -> None:
    found = check(*whole)
    assert found.images == {"inventory.img": b"inventory", "files.img": b"files"}
    assert found.big_images == ["pages-1.img"]


CAPABILITY = bytes.fromhex("01000002" + "ff" * 16)


def flip(path: Path) -> None:
    """Flips a bit in the last byte, and puts the times back."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace_by_link(path: Path) -> None:
    elsewhere = path.parent.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def put_instead(path: Path, mode: int, device: int = 0) -> None:
    path.unlink()
    os.mknod(path, mode, device)


def relink(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def copy_instead(path: Path) -> None:
    content_before = path.read_text()
    path.unlink()
    path.write_text(content_before)


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a bit of the pages": ("criu/pages-1.img", flip, "criu/pages-1.img, chunk 1 of 4"),
    "a bit of an image": ("criu/inventory.img", flip, "criu/inventory.img, chunk 0"),
    "a bit of a file": ("rootfs/etc/motd", flip, "rootfs/etc/motd, chunk 0"),
    "a bit in a hole": ("rootfs/sparse", flip, "rootfs/sparse, chunk 2"),
    "a bit of shm": ("shm/segment", flip, "shm/segment, chunk 0"),
    "a bit of a listing": ("rootfs.tree", flip, "rootfs.tree: expected SHA-256"),
    "a bit of an image's listing": ("criu.tree", flip, "criu.tree: expected SHA-256"),
    "an image that is shorter": (
        "criu/pages-1.img", lambda path: os.truncate(path, 7), "expected size"),
    "an image that is gone": ("criu/pages-1.img", Path.unlink, "the file as listed, found no"),
    "an image that is a link": ("criu/pages-1.img", replace_by_link, "expected mode 0o100644"),
    "a listing that is gone": ("shm.tree", Path.unlink, "shm.tree: expected .* found nothing"),
    "a listing that is longer": (
        "shm.tree", lambda path: path.write_bytes(b" " * 9999), "longer than"),
    "no images": ("criu", shutil.rmtree, "criu: expected the file as listed, found nothing"),
    "another image": ("criu/parent", Path.touch, "parent: expected no such file, found a file"),
    "a link to a parent": (
        "criu/parent", lambda path: path.symlink_to("/"), "criu/parent: expected no such file"),
    "another file": ("rootfs/etc/a", Path.touch, "etc/a: expected no such file, found a file"),
    "another last file": ("shm/z", Path.touch, "shm/z: expected no such file, found a file"),
    "another part": ("more", Path.mkdir, "more: expected no such file, found a file"),
    "a file that is gone": ("rootfs/etc/fifo", Path.unlink, "fifo: expected the file as listed"),
    "a last file that is gone": ("shm/segment", Path.unlink, "segment: expected the file as"),
    "a setuid bit": ("rootfs/etc/motd", lambda path: path.chmod(0o4755), "mode 0o100644, found 0"),
    "an owner": ("rootfs/etc/deep", lambda path: os.chown(path, 7, -1), "deep: expected owner 0"),
    "a group": (
        "rootfs/etc/link", lambda path: os.chown(path, -1, 7, follow_symlinks=False),
        "link: expected group 0, found 7"),
    "a time": ("rootfs/etc/motd", lambda path: os.utime(path, (1, 1)), "motd: expected mtime"),
    "an xattr": (
        "rootfs/etc/motd", lambda path: os.setxattr(path, "user.note", b"b"), "expected xattrs"),
    "one more xattr": (
        "rootfs/etc/deep", lambda path: os.setxattr(path, "trusted.overlay.opaque", b"y"),
        "deep: expected xattrs {}, found {'trusted.overlay.opaque': '79'}"),
    "a capability": (
        "rootfs/etc/motd", lambda path: os.setxattr(path, "security.capability", CAPABILITY),
        "motd: expected xattrs"),
    "one xattr less": (
        "rootfs/etc/motd", lambda path: os.removexattr(path, "user.note"), "found {}"),
    "another device": (
        "rootfs/etc/gone", lambda path: put_instead(path, 0o020600, os.makedev(1, 3)), "mode"),
    "another number": (
        "rootfs/etc/gone", lambda path: put_instead(path, 0o020000, os.makedev(1, 3)),
        "expected size, device or target 0, found 259"),
    "another kind": (
        "rootfs/etc/fifo", lambda path: put_instead(path, 0o140644), "fifo: expected mode"),
    "another target": (
        "rootfs/etc/link", lambda path: relink(path, "/etc/passwd"), "motd, found /etc/passwd"),
    "a hard link that is a copy": ("rootfs/etc/same", copy_instead, "etc/same: expected"),
    "the part's own directory": ("rootfs", lambda path: path.chmod(0o777), "rootfs: expected mode"),
    "a name elsewhere": (
        "rootfs/sparse", lambda path: os.link(path, path.parent.parent.parent / "other"),
        "rootfs/sparse: expected names in its part only, found a name elsewhere"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_error_names_every_change(own: tuple[Path, Manifest], damage: str) -> None:
    place, manifest = own
    path, change, why = DAMAGE[damage]
    change(place / path)
    with pytest.raises(SnapshotNotWhole, match=why) as caught:
        check(place, manifest)
    assert manifest.id[:12] in str(caught.value)


# Mutations: without the comparison the same damage is not seen, so the tests above can fail


def test_only_the_comparison_of_contents_finds_a_flipped_bit(
    own: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, manifest = own
    flip(place / "criu/pages-1.img")
    flip(place / "criu/inventory.img")
    with pytest.raises(SnapshotNotWhole):
        check(place, manifest)
    monkeypatch.setattr(content, "_compare", lambda *_: None)
    check(place, manifest)


def test_only_the_comparison_of_attributes_finds_a_setuid_bit(
    own: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, manifest = own
    (place / "rootfs/etc/motd").chmod(0o4755)
    with pytest.raises(SnapshotNotWhole):
        check(place, manifest)
    monkeypatch.setattr(tree.Entry, "attributes", lambda _: None)
    monkeypatch.setattr(tree, "_but_for_time", lambda *_: True)
    monkeypatch.setattr(tree, "_differs", lambda *_: None)
    check(place, manifest)


# Marks


@pytest.fixture
def marked(own: tuple[Path, Manifest], tmp_path: Path) -> tuple[Path, Manifest, Path]:
    """Returns a snapshot that was checked once, so that everything has its mark."""
    time.sleep(0.06)
    marks = tmp_path / "marks"
    assert check(*own, marks).hashed_bytes > 5 * MIB
    return *own, marks


def test_marked_and_untouched_file_is_not_hashed_again(
    marked: tuple[Path, Manifest, Path],
) -> None:
    place, manifest, marks = marked
    assert check(place, manifest, marks).hashed_bytes == 0
    assert check(place, manifest, None).hashed_bytes > 5 * MIB, "marks are not used then"
    assert stat.S_IMODE((marks / manifest.id).stat().st_mode) == 0o700
    assert stat.S_IMODE((marks / manifest.id / "criu").stat().st_mode) == 0o600


def rewrite(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data)


def rename_over(path: Path) -> None:
    fresh = path.parent.parent / "fresh"
    shutil.copy2(path, fresh)
    fresh.rename(path)


def truncate_and_back(path: Path) -> None:
    size = path.stat().st_size
    os.truncate(path, size - 1)
    os.truncate(path, size)


@pytest.mark.parametrize("change", [flip, truncate_and_back])
@pytest.mark.parametrize("path", ["criu/pages-1.img", "shm/segment", "rootfs/etc/motd"])
def test_marks_end_with_their_snapshot(
    marked: tuple[Path, Manifest, Path], path: str, change: Callable[[Path], None]
) -> None:
    place, manifest, marks = marked
    whole_file = place / path
    status = whole_file.stat()
    change(whole_file)
    os.utime(whole_file, ns=(status.st_atime_ns, status.st_mtime_ns))  # as `touch -r` does
    with pytest.raises(SnapshotNotWhole, match=f"{path}, chunk"):
        check(place, manifest, marks)


@pytest.mark.parametrize("change", [rewrite, rename_over])
def test_the_same_content_in_another_inode_or_time_is_hashed_again(
    marked: tuple[Path, Manifest, Path], change: Callable[[Path], None]
) -> None:
    place, manifest, marks = marked
    change(place / "criu/pages-1.img")
    os.chmod(place / "criu/pages-1.img", 0o644)
    assert check(place, manifest, marks).hashed_bytes == 5 * MIB


def test_small_image_is_read_at_each_use(marked: tuple[Path, Manifest, Path]) -> None:
    place, manifest, marks = marked
    flip(place / "criu/inventory.img")
    with pytest.raises(SnapshotNotWhole, match="inventory"):
        check(place, manifest, marks)


@pytest.mark.parametrize("path", ["rootfs/new", "rootfs/etc/deep/new", "shm/new"])
def test_marks_do_not_hide_a_new_file(marked: tuple[Path, Manifest, Path], path: str) -> None:
    place, manifest, marks = marked
    (place / path).touch()
    with pytest.raises(SnapshotNotWhole, match=f"{path}: expected no such file"):
        check(place, manifest, marks)


def test_recently_changed_file_gets_no_mark(own: tuple[Path, Manifest], tmp_path: Path) -> None:
    place, manifest = own
    now = time.time_ns()
    (place / "rootfs/etc/motd").chmod(0o644)  # its change time is now
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shim.integrity.marks.now_ns", lambda: now)
        check(place, manifest, tmp_path / "marks")
    assert (tmp_path / "marks" / manifest.id / "criu").exists()
    assert not (tmp_path / "marks" / manifest.id / "rootfs").exists(), "or it would look complete"


def test_marks_count_only_on_a_file_system_of_the_node(
    marked: tuple[Path, Manifest, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, manifest, marks = marked
    monkeypatch.setattr(filesystem, "magic", lambda _: 0x6969)  # NFS
    assert check(place, manifest, marks).hashed_bytes > 5 * MIB


@pytest.mark.parametrize("garbage", [b"", b"[]", b'{"schema": 9}', b"\xff"])
def test_unreadable_marks_count_as_missing(
    marked: tuple[Path, Manifest, Path], garbage: bytes
) -> None:
    place, manifest, marks = marked
    for part in ("criu", "rootfs", "shm"):
        (marks / manifest.id / part).write_bytes(garbage)
    assert check(place, manifest, marks).hashed_bytes > 5 * MIB


def test_publishing_marks_the_files_that_it_has_hashed(tmp_path: Path) -> None:
    make_parts(tmp_path / "snapshot")
    _, found = recorded(tmp_path / "snapshot")
    assert list(found.marks["criu"]) == ["criu/pages-1.img"]
    for part in ("rootfs", "shm"):
        with open_dir(str(tmp_path / "snapshot")) as directory:
            assert marks.is_sealed(directory.fileno(), part, found.marks[part])
            (tmp_path / "snapshot" / part).chmod(0o711)
            assert not marks.is_sealed(directory.fileno(), part, found.marks[part])


# Errors that are damage, and errors that are not


@pytest.mark.parametrize(
    ("code", "error", "why"),
    [
        (errno.EIO, SnapshotNotWhole, "shm/segment, chunk 0 of 4 MiB: expected readable content"),
        (errno.ENOMEM, OSError, "memory"),
    ],
)
def test_disk_error_is_damage_and_lack_of_memory_is_not(
    whole: tuple[Path, Manifest],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    error: type[Exception],
    why: str,
) -> None:
    def fail(*_: object) -> str:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(chunks, "digest", fail)
    with pytest.raises(error, match=why):
        check(*whole)


# Between the check and the use


def test_change_after_the_check_is_found_afterwards(own: tuple[Path, Manifest]) -> None:
    place, manifest = own
    with checking(place, manifest) as found:
        found.begin()
        found.finish()
        rename_over(place / "criu/pages-1.img")
        with pytest.raises(
            SnapshotNotWhole, match=r"pages-1.img: expected the file that was checked"
        ):
            found.unchanged()


def test_check_beyond_its_deadline_fails(own: tuple[Path, Manifest]) -> None:
    place, manifest = own
    with checking(place, manifest, until=0) as found, pytest.raises(TooLate):
        found.begin()


def test_threads_end_with_the_first_error_and_with_the_check() -> None:
    work = Work(time.monotonic() + 60)

    def fail() -> None:
        raise ValueError("first")

    def work_on() -> None:
        while True:
            work.tick()
            time.sleep(0.001)

    work.add(fail)
    work.add(work_on)
    work.start()
    with pytest.raises(ValueError, match="first"):
        work.finish()
    again = work.again()

    def wait_for_the_end() -> None:
        while True:
            again.tick()
            time.sleep(0.001)

    again.add(wait_for_the_end)
    again.start()
    again.stop()


def test_jobs_may_add_jobs() -> None:
    work, done = Work(time.monotonic() + 60), []

    def more(left: int) -> None:
        done.append(left)
        if left:
            work.add(lambda: more(left - 1))

    work.add(lambda: more(50))
    work.start()
    work.finish()
    assert done == list(range(50, -1, -1))


def test_check_of_few_bytes_imports_no_threads(
    marked: tuple[Path, Manifest, Path],
) -> None:
    place, manifest, marks = marked
    (place / "manifest.json").write_bytes(manifest.encode())
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from shim.contract import manifest
from shim.integrity.check import SnapshotCheck
import shim.restore.sequence
dirfd = os.open({str(place)!r}, os.O_RDONLY)
found = manifest.read(dirfd, snapshot={manifest.id!r})
with SnapshotCheck(
    dirfd, found, container="c1", until=1e99, marks_directory={str(marks)!r}
) as check:
    check.begin()
    check.finish()
print(check.hashed_bytes, not {{"threading", "shutil"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-ISE", "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0 True\n", "")


# Limits of size


def test_listing_has_no_paths_and_marks_do_not_grow(tmp_path: Path) -> None:
    deep = tmp_path / "snapshot/rootfs" / "/".join(["d" * 100] * 30)
    deep.mkdir(parents=True)
    (tmp_path / "snapshot/criu").mkdir()
    for number in range(500):
        (deep / f"{number}").touch()
    time.sleep(0.06)
    manifest, found = recorded(tmp_path / "snapshot")
    paths = 500 * len(str(deep))
    assert (tmp_path / "snapshot/rootfs.tree").stat().st_size < paths / 10
    assert len(found.marks["rootfs"]) == 1
    check(tmp_path / "snapshot", manifest, tmp_path / "marks")
    assert (tmp_path / "marks" / manifest.id / "rootfs").stat().st_size < 200


@pytest.mark.parametrize("name", ["MAX_DEPTH", "_MOST_ENTRIES", "MAX_PATH_BYTES"])
def test_snapshot_beyond_its_limits_is_refused(
    whole: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(tree, name, 1)
    with pytest.raises(SnapshotNotWhole, match=r"expected .* at most.*found more"):
        check(*whole)


def test_listing_beyond_its_limit_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_parts(tmp_path)
    monkeypatch.setattr("shim.integrity.record.MAX_LISTING_BYTES", 300)
    with pytest.raises(TooMuch, match=r"bytes of criu.tree: a snapshot holds 300 at most"):
        recorded(tmp_path)


def test_error_names_a_changed_listing_and_not_the_listed_files(
    own: tuple[Path, Manifest],
) -> None:
    place, manifest = own
    listing = place / "rootfs.tree"
    digest = listing.read_bytes().partition(b'["')[2][:64]
    listing.write_bytes(listing.read_bytes().replace(digest, b"0" * 64))
    with pytest.raises(SnapshotNotWhole, match=r"rootfs.tree: expected SHA-256"):
        check(place, manifest)


# Chunks and listings as data


@pytest.mark.parametrize("size", [0, 1, 4 * MIB - 1, 4 * MIB, 4 * MIB + 1, 8 * MIB])
def test_chunks_cover_every_byte(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        found = chunks.digests(fd, size)
        assert found == chunks.digests_of(data)
        assert len(found) == chunks.count(size)
        with pytest.raises(chunks.Short):
            chunks.digests(fd, size + 1)
    finally:
        os.close(fd)


def test_a_hole_has_the_digest_of_zeros(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    os.truncate(path, 12 * MIB)
    with path.open("rb") as file:
        assert chunks.digests(file.fileno(), 12 * MIB) == chunks.digests_of(path.read_bytes())


TEXT = st.binary(min_size=1, max_size=20).map(tree.text)


@given(
    TEXT, st.integers(0, 1 << 63), st.integers(0, 1 << 63) | TEXT,
    st.dictionaries(TEXT, st.binary(max_size=9).map(bytes.hex)), st.integers(0, 1 << 20),
    st.lists(st.binary(min_size=32, max_size=32).map(bytes.hex)),
)  # fmt: skip
def test_listing_line_survives_writing_and_reading(
    name: str, number: int, value: int | str, xattrs: dict[str, str], link: int, digests: list[str]
) -> None:
    attributes: list[object] = [7, name, number, number, 0, number, value, xattrs, link]
    line = Line(tree.encode(attributes, digests, ""))
    assert (line.attributes, line.digests) == (attributes, digests)
    assert (line.depth, line.name) == (7, name)
    assert tree.raw(tree.text(tree.raw(name))) == tree.raw(name)


@given(st.binary(max_size=100))
def test_no_bytes_in_a_line_raise_another_error(data: bytes) -> None:
    with contextlib.suppress(ValueError, RecursionError):
        Line(data)


@settings(
    max_examples=60, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(st.data())
def test_change_of_any_byte_of_any_file_is_found(
    whole: tuple[Path, Manifest], data: st.DataObject
) -> None:
    place, manifest = whole
    files = sorted(
        os.fsencode(path) for path in place.rglob("*")
        if path.is_file() and not path.is_symlink() and path.stat().st_size
    )  # fmt: skip
    chosen = data.draw(st.sampled_from(files))
    status = os.stat(chosen)
    at = data.draw(st.integers(0, status.st_size - 1))
    bit = 1 << data.draw(st.integers(0, 7))
    sparse = status.st_blocks * 512 < status.st_size
    assume(not sparse or at < 4 * MIB)  # a hole that was written to stays data
    fd = os.open(chosen, os.O_RDWR)
    try:
        byte = os.pread(fd, 1, at)[0]
        os.pwrite(fd, bytes([byte ^ bit]), at)
        os.utime(chosen, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(SnapshotNotWhole):
            check(place, manifest)
        os.pwrite(fd, bytes([byte]), at)
        os.utime(chosen, ns=(status.st_atime_ns, status.st_mtime_ns))
    finally:
        os.close(fd)
    check(place, manifest)


NAMES = st.binary(min_size=1, max_size=30).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..")
)
CHANGES: dict[str, Callable[[bytes, st.DataObject], object]] = {
    "mode": lambda path, data: os.chmod(path, data.draw(st.integers(0, 0o7777))),
    "owner": lambda path, data: os.chown(path, data.draw(st.integers(0, 99999)), -1),
    "group": lambda path, data: os.chown(path, -1, data.draw(st.integers(0, 99999))),
    "xattr": lambda path, data: os.setxattr(
        path, "user." + data.draw(st.text("abc", min_size=1)), data.draw(st.binary(max_size=9))
    ),
    "time": lambda path, data: os.utime(path, ns=(0, data.draw(st.integers(0, 1 << 60)))),
    "content": lambda path, data: Path(os.fsdecode(path)).write_bytes(data.draw(st.binary())),
    "name": lambda path, data: os.rename(path, os.path.dirname(path) + b"/" + data.draw(NAMES)),
    "one more": lambda path, data: os.close(
        os.open(os.path.dirname(path) + b"/" + data.draw(NAMES), os.O_CREAT)
    ),
    "one less": lambda path, _: os.unlink(path),
    "a link": lambda path, data: os.link(path, os.path.dirname(path) + b"/" + data.draw(NAMES)),
}


def as_it_is(top: bytes) -> dict[bytes, object]:
    """Returns everything below `top` that a restored container could see, by other code."""
    found: dict[bytes, object] = {}
    for directory, directories, files in os.walk(top):
        for path in (directory, *(directory + b"/" + name for name in (*directories, *files))):
            status = os.lstat(path)
            xattrs = {name: os.getxattr(path, name) for name in os.listxattr(path)}
            regular = stat.S_ISREG(status.st_mode)
            found[path] = (
                status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_nlink,
                xattrs, Path(os.fsdecode(path)).read_bytes() if regular else b"",
            )  # fmt: skip
    return found


@settings(
    max_examples=150, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(st.sets(NAMES, min_size=1, max_size=6), st.data())
def test_any_change_of_any_tree_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: set[bytes], data: st.DataObject
) -> None:
    monkeypatch.setattr("shim.integrity.marks.SETTLED_NS", 0)
    shutil.rmtree(tmp_path / "snapshot", ignore_errors=True)
    rootfs = tmp_path / "snapshot/rootfs"
    rootfs.mkdir(parents=True)
    (tmp_path / "snapshot/criu").mkdir()
    for name in names:
        Path(os.fsdecode(bytes(rootfs) + b"/" + name)).write_bytes(name)
    manifest, _ = recorded(tmp_path / "snapshot")
    before = as_it_is(bytes(rootfs))
    check(tmp_path / "snapshot", manifest)
    chosen = bytes(rootfs) + b"/" + data.draw(st.sampled_from(sorted(names)))
    with contextlib.suppress(FileExistsError):
        CHANGES[data.draw(st.sampled_from(sorted(CHANGES)))](chosen, data)
    if as_it_is(bytes(rootfs)) == before:
        check(tmp_path / "snapshot", manifest)
    else:
        with pytest.raises(SnapshotNotWhole):
            check(tmp_path / "snapshot", manifest)


# fs-verity: our requests to the kernel, and the meaning of its answers. Sources: linux/fsverity.h


def test_verity_request_has_the_layout_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, bytes]] = []

    def ioctl(_fd: int, request: int, argument: bytes) -> int:
        asked.append((request, bytes(argument)))
        return 0

    monkeypatch.setattr("shim.kernel.filesystem.fcntl.ioctl", ioctl)
    assert filesystem.enable_verity(3)
    request, argument = asked[0]
    assert request == 1 << 30 | len(argument) << 16 | ord("f") << 8 | 133
    assert len(argument) == 128
    assert argument.startswith(struct.pack("=IIII", 1, 1, 4096, 0))
    assert set(argument[16:]) == {0}


@pytest.mark.parametrize("code", [errno.ENOTTY, errno.EOPNOTSUPP, errno.ENODATA])
def test_a_file_system_without_verity_is_no_error(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def ioctl(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("shim.kernel.filesystem.fcntl.ioctl", ioctl)
    assert not filesystem.enable_verity(3)
    assert filesystem.measure_verity(3) == ""


@pytest.fixture
def verity(monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """Returns by inode the digest that a kernel would measure. Everything from 1 MiB is enabled."""
    measured: dict[int, str] = {}

    def enable(fd: int) -> bool:
        measured[os.fstat(fd).st_ino] = chunks.digests(fd, os.fstat(fd).st_size)[0]
        os.utime(fd)  # as Linux 6.1 does with ext4
        return True

    monkeypatch.setattr(filesystem, "enable_verity", enable)
    monkeypatch.setattr(
        filesystem, "measure_verity", lambda fd: measured.get(os.fstat(fd).st_ino, "")
    )
    return measured


def test_file_with_verity_is_not_hashed(tmp_path: Path, verity: dict[int, str]) -> None:
    place = tmp_path / "snapshot"
    make_parts(place)
    manifest, _ = recorded(place)
    assert len(verity) == 2
    assert check(place, manifest, tmp_path / "marks").hashed_bytes < MIB
    assert check(place, manifest).hashed_bytes > 5 * MIB, "`verify` reads it all the same"
    verity[(place / "criu/pages-1.img").stat().st_ino] = "0" * 64
    shutil.rmtree(tmp_path / "marks")
    with pytest.raises(SnapshotNotWhole, match=r"pages-1.img: expected fs-verity \w+, found 0000"):
        check(place, manifest, tmp_path / "marks")
    verity.clear()  # copied to a file system without verity
    assert check(place, manifest, tmp_path / "marks").hashed_bytes > 5 * MIB
