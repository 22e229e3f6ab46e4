"""A neighbour that replaces a name between two calls changes no other file."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

import pytest

from shim.contract.errors import NotCapturable, ShmNotFilled
from shim.criu.images import LinkRemap
from shim.kernel import sharedobjects
from shim.kernel.beneath import NotMade, files_beneath, link_beneath, make_dir, open_dir
from shim.kernel.sharedobjects import OpenObject
from shim.kernel.stopping import Stop
from shim.rootfs.inode import Copier
from shim.rootfs.topdir import attributes, set_attributes
from shim.shm import fill
from shim.source.deleted import SHM, Copied, Remapped, give_links, names_in

KINDS = ("fifo", "socket", "symlink")


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_bytes(b"root's")
    path.chmod(0o600)
    return path


def _make(path: Path, kind: str) -> None:
    if kind == "symlink":
        path.symlink_to("somewhere")
    else:
        os.mknod(path, {"fifo": stat.S_IFIFO, "socket": stat.S_IFSOCK}[kind] | 0o600)
        path.chmod(0o4777)
    os.chown(path, 1000, 1000, follow_symlinks=False)


def _facts(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_nlink


@pytest.mark.parametrize("by", ["link", "hard link", "file"])
@pytest.mark.parametrize("kind", KINDS)
def test_replaced_copy_changes_attributes_of_no_other_file(
    tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch, kind: str, by: str
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    _make(source / "n", kind)
    if by == "hard link":
        os.link(victim, tmp_path / "second")
    before = _facts(victim)
    made, linked = os.mknod, os.symlink

    def replace() -> None:
        (target / "n").unlink()
        if by == "link":
            linked(victim, target / "n")
        elif by == "hard link":
            os.rename(tmp_path / "second", target / "n")
        else:
            (target / "n").write_bytes(b"")
            os.chown(target / "n", 5, 5)

    def mknod(*arguments: object, **more: object) -> None:
        made(*arguments, **more)  # type: ignore[arg-type]  # as it was called
        replace()

    def symlink(*arguments: object, **more: object) -> None:
        linked(*arguments, **more)  # type: ignore[arg-type]  # as it was called
        replace()

    monkeypatch.setattr(os, "mknod", mknod)
    monkeypatch.setattr(os, "symlink", symlink)
    # A symlink in the place of a symlink gets the attributes itself: nothing is followed.
    is_same_kind = (kind, by) == ("symlink", "link")
    with (
        open_dir(str(source)) as there,
        open_dir(str(target)) as here,
        suppress(NotMade) if is_same_kind else pytest.raises(NotMade),
    ):
        Copier().copy(there.fileno(), "n", here.fileno())
    assert _facts(victim) == before


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_type_gets_its_attributes(tmp_path: Path, kind: str) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    _make(source / "n", kind)
    os.utime(source / "n", ns=(1, 2), follow_symlinks=False)
    os.setxattr(source / "n", "trusted.of", b"it", follow_symlinks=False)
    with open_dir(str(source)) as there, open_dir(str(target)) as here:
        Copier().copy(there.fileno(), "n", here.fileno(), "other")
    old, new = os.lstat(source / "n"), os.lstat(target / "other")
    for fact in ("st_mode", "st_uid", "st_gid", "st_mtime_ns"):
        assert getattr(new, fact) == getattr(old, fact), fact
    assert os.getxattr(target / "other", "trusted.of", follow_symlinks=False) == b"it"


def test_replaced_directory_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    os.chown(tmp_path / "elsewhere", 5, 5)
    made = os.mkdir

    def mkdir(name: str, mode: int, *, dir_fd: int) -> None:
        made(name, mode, dir_fd=dir_fd)
        os.rmdir(name, dir_fd=dir_fd)
        os.rename(tmp_path / "elsewhere", tmp_path / name)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with open_dir(str(tmp_path)) as here, pytest.raises(NotMade):
        make_dir("d", here.fileno())


def test_top_directory_of_a_layer_is_never_the_target_of_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "layer").symlink_to("real")
    wanted = attributes(str(tmp_path / "real"))
    with pytest.raises(NotADirectoryError):
        set_attributes(str(tmp_path / "layer"), {**wanted, "mode": 0o777})
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o700


# Names of deleted files


@pytest.mark.parametrize("where", ["of the file", "of the new name"])
def test_link_in_the_copy_brings_no_file_of_the_node_into_a_snapshot(
    tmp_path: Path, victim: Path, where: str
) -> None:
    """A neighbour made a directory of the link after /dev/shm was copied."""
    original, copy = tmp_path / "original", tmp_path / "copy"
    (original / "d").mkdir(parents=True)
    os.link(victim, original / "d" / victim.name)
    copy.mkdir()
    (copy / "d").symlink_to(tmp_path)
    if where == "of the new name":
        (original / victim.name).write_bytes(b"")
        (copy / victim.name).write_bytes(b"")
    lost = original / ("d" if where == "of the file" else "") / victim.name
    new = "link_remap.1" if where == "of the file" else "d/link_remap.1"
    with pytest.raises(OSError, match=r"."):
        _give_links(LinkRemap("dev/shm/lost", f"dev/shm/{new}"), lost.stat().st_ino, original, copy)
    assert not list(tmp_path.glob("**/link_remap.1"))


def _give_links(remap: LinkRemap, inode: int, original: Path, copy: Path) -> None:
    inodes = {remap.original: inode}
    names = names_in(SHM, str(original), [remap], inodes, Stop())
    give_links(Remapped([remap], [Copied(SHM, names, str(copy))]), inodes, "c", Stop())


def test_deleted_file_gets_the_name_of_its_link_remap(tmp_path: Path) -> None:
    original, copy = tmp_path / "original", tmp_path / "copy"
    for each in (original, copy):
        (each / "d").mkdir(parents=True)
        (each / "d" / "kept").write_bytes(b"k")
    remap = LinkRemap("dev/shm/d/lost", "dev/shm/d/link_remap.1")
    inode = (original / "d" / "kept").stat().st_ino
    _give_links(remap, inode, original, copy)
    assert os.path.samefile(copy / "d" / "link_remap.1", copy / "d" / "kept")
    with pytest.raises(NotCapturable):
        _give_links(remap, 1, original, copy)


def test_walk_opens_only_directories_and_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "f").write_bytes(b"")
    os.mkfifo(tmp_path / "a" / "fifo")
    (tmp_path / "link").symlink_to("/")
    with open_dir(str(tmp_path)) as top:
        assert sorted(path for path, _ in files_beneath(top.fileno())) == [
            "a/b/f",
            "a/fifo",
            "link",
        ]
        with pytest.raises(OSError, match="directories in each other"):
            list(files_beneath(top.fileno(), 2))


def test_hard_link_to_a_symlink_names_the_symlink_itself(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    with open_dir(str(tmp_path)) as top:
        link_beneath(top.fileno(), "link", top.fileno(), "second")
    assert os.readlink(tmp_path / "second") == "/etc/passwd"


# Shared memory of running processes


@pytest.mark.parametrize("theirs", ["fifo", "device", "file"])
def test_descriptor_that_became_another_file_is_not_opened(tmp_path: Path, theirs: str) -> None:
    fd = os.memfd_create("object")
    path = sharedobjects.found([os.getpid()])[os.fstat(fd).st_ino]
    if theirs == "fifo":
        os.mkfifo(tmp_path / "other")
    elif theirs == "device":
        os.mknod(tmp_path / "other", stat.S_IFCHR | 0o600, os.makedev(1, 5))
    else:
        (tmp_path / "other").write_bytes(b"of the node")
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_NONBLOCK)
    os.dup2(other, fd)
    try:
        with pytest.raises(OSError, match="no object of shared memory any more"):
            OpenObject(path.replace(str(os.getpid()), "self"))
    finally:
        os.close(fd)
        os.close(other)


# /dev/shm


def _pods(tmp_path: Path) -> tuple[str, str]:
    snapshot, shm = tmp_path / "snapshot", tmp_path / "shm"
    (snapshot / "d" / "e").mkdir(parents=True)
    for name in ("a", "d/e/f", "z"):
        (snapshot / name).write_bytes(name.encode())
    shm.mkdir()
    return str(snapshot), str(shm)


def test_no_file_has_its_name_before_all_are_complete(tmp_path: Path) -> None:
    snapshot, shm = _pods(tmp_path)
    put = fill.plan(snapshot, shm, container="c")
    fill.build(snapshot, shm, put, container="c")
    (private,) = os.listdir(shm)
    assert stat.S_IMODE(os.lstat(f"{shm}/{private}").st_mode) == 0o700
    fill.place(shm, put, container="c")
    assert sorted(os.listdir(shm)) == ["a", "d", "z"]
    assert Path(f"{shm}/d/e/f").read_bytes() == b"d/e/f"


def test_undo_removes_only_the_files_that_were_renamed_in(tmp_path: Path) -> None:
    """A name that came up meanwhile belongs to another container, and stays."""
    snapshot, shm = _pods(tmp_path)
    put = fill.plan(snapshot, shm, container="c")
    fill.build(snapshot, shm, put, container="c")
    Path(f"{shm}/z").write_bytes(b"theirs")
    with pytest.raises(ShmNotFilled, match="z exists: it came up meanwhile"):
        fill.place(shm, put, container="c")
    assert sorted(name for name in os.listdir(shm) if name[0] != ".") == ["a", "d", "z"]
    fill.undo(shm, put, container="c", placed=True)
    assert os.listdir(shm) == ["z"]
    assert Path(f"{shm}/z").read_bytes() == b"theirs"


def test_undo_before_the_renames_touches_no_name(tmp_path: Path) -> None:
    snapshot, shm = _pods(tmp_path)
    put = fill.plan(snapshot, shm, container="c")
    fill.build(snapshot, shm, put, container="c")
    Path(f"{shm}/a").write_bytes(b"theirs")
    for _ in range(2):
        fill.undo(shm, put, container="c", placed=False)
        assert os.listdir(shm) == ["a"]


def test_device_is_never_made_in_the_shm_of_a_pod(tmp_path: Path) -> None:
    snapshot, shm = _pods(tmp_path)
    os.mknod(f"{snapshot}/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    put = fill.plan(snapshot, shm, container="c")
    with pytest.raises(ShmNotFilled, match="null is a device"):
        fill.build(snapshot, shm, put, container="c")
