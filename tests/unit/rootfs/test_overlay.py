"""The overlay of a container is read, made longer and put back, on real overlayfs."""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.kernel import mounts
from shim.rootfs import overlay
from tests.unit import rootfs_trees as trees

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

paths = st.lists(st.text(st.characters(exclude_characters="\0"), min_size=1), min_size=1)


@given(paths)
def test_lowerdirs_survive_escaping(lowerdirs: list[str]) -> None:
    assert overlay.split_lowerdirs(overlay.join_lowerdirs(lowerdirs)) == lowerdirs


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Path]:
    """Makes snapshots of a snapshotter (1 to 3 are layers, 9 is the container's) and a captured
    diff.
    """
    with trees.own_mounts(tmp_path):
        for name in ("1", "2", "3", "9"):
            trees.make_dirs(tmp_path / "snapshots" / name, "fs", "work")
        trees.make_dirs(tmp_path, "rootfs", "diff/d")
        (tmp_path / "snapshots/1/fs/f").write_bytes(b"of the image")
        (tmp_path / "diff/f").write_bytes(b"of the snapshot")
        (tmp_path / "diff").chmod(0o1700)
        os.setxattr(tmp_path / "diff", "user.of", b"snapshot")
        os.utime(tmp_path / "diff", ns=(1, 2))
        yield tmp_path


def _mount(
    node: Path,
    layers: list[str],
    *,
    options: str = "index=off",
    flags: int = 0,
    relative: bool = False,
) -> str:
    """Mounts as containerd does; relative: as containerd does when the options would not fit a
    page.
    """
    upper = f"upperdir={node}/snapshots/9/fs,workdir={node}/snapshots/9/work"
    prefix = "" if relative else f"{node}/snapshots/"
    lower = ":".join(f"{prefix}{layer}/fs" for layer in layers)
    with contextlib.chdir(node / "snapshots"):
        mounts.mount(
            "overlay", f"{node}/rootfs", "overlay", flags, f"{options},lowerdir={lower},{upper}"
        )
    return f"{node}/rootfs"


def _line(rootfs: str) -> tuple[object, ...]:
    """Returns the fields of a line in mountinfo that a new mount can share with an old mount."""
    (mount,) = mounts.mounts_at(rootfs)
    kinds = tuple(field.split(":")[0] for field in mount.propagation)
    return mount.root, mount.options, kinds, mount.source, mount.super_options


def _upper(node: Path) -> tuple[object, ...]:
    upper = f"{node}/snapshots/9/fs"
    status = os.stat(upper)
    xattrs = {name: os.getxattr(upper, name) for name in os.listxattr(upper)}
    return os.listdir(upper), status.st_mode, status.st_uid, status.st_mtime_ns, xattrs


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ("index=off", mounts.MS_RELATIME),
        ("index=on,xino=on", mounts.MS_NODEV | mounts.MS_NOATIME),
        ("volatile,metacopy=on,redirect_dir=on", mounts.MS_NOSUID | mounts.MS_STRICTATIME),
        ("userxattr,uuid=null", mounts.MS_RELATIME | mounts.MS_NOEXEC | mounts.MS_NODIRATIME),
    ],
)
def test_remount_and_undo_leave_no_trace(
    node: Path, options: str, flags: int, *, shared: bool, relative: bool
) -> None:
    rootfs = _mount(node, ["3", "2", "1"], options=options, flags=flags, relative=relative)
    if shared:
        mounts.set_propagation(rootfs, mounts.MS_SHARED)
    line, upper = _line(rootfs), _upper(node)
    described = json.loads(json.dumps(overlay.describe(rootfs)))

    overlay.with_extra_lower(rootfs, f"{node}/diff")
    assert (node / "rootfs/f").read_bytes() == b"of the snapshot"
    root = os.stat(rootfs)
    assert (root.st_mode & 0o7777, root.st_mtime_ns) == (0o1700, 2)
    if "userxattr" not in options:
        assert os.getxattr(rootfs, "user.of") == b"snapshot"
    assert _line(rootfs)[:4] == line[:4]
    (node / "rootfs/f").write_bytes(b"by a restored process")
    (node / "rootfs/d/new").mkdir()

    overlay.remount(described)
    assert (_line(rootfs), _upper(node)) == (line, upper)
    assert (node / "rootfs/f").read_bytes() == b"of the image"
    assert not os.path.exists(f"{node}/diff/d/new")


def test_remount_completes_after_a_kill_between_unmount_and_mount(node: Path) -> None:
    rootfs = _mount(node, ["2", "1"])
    line, described = _line(rootfs), overlay.describe(rootfs)
    mounts.unmount(rootfs)
    (node / "snapshots/9/fs/half").mkdir()
    overlay.remount(described)
    assert (_line(rootfs), _upper(node)[0]) == (line, [])


def test_remount_never_empties_a_container_that_started_cold(node: Path) -> None:
    rootfs = _mount(node, ["2", "1"])
    described = overlay.describe(rootfs)
    (node / "rootfs/work").write_bytes(b"of hours")
    before = mounts.mounts_at(rootfs)[0].mount_id
    overlay.remount(described)
    assert (node / "rootfs/work").read_bytes() == b"of hours"
    assert mounts.mounts_at(rootfs)[0].mount_id == before


def test_remount_touches_no_other_containers_overlay(node: Path) -> None:
    rootfs = _mount(node, ["2", "1"])
    described = overlay.describe(rootfs)
    described["upperdir"] = f"{node}/snapshots/3/fs"
    with pytest.raises(ValueError, match="is the overlay of"):
        overlay.remount(described)


def test_remount_detaches_a_mount_in_use(node: Path) -> None:
    rootfs = _mount(node, ["2", "1"])
    line, described = _line(rootfs), overlay.describe(rootfs)
    overlay.with_extra_lower(rootfs, f"{node}/diff")
    with open(f"{rootfs}/f", "rb"):
        overlay.remount(described)
    assert _line(rootfs) == line


def test_process_inside_stops_the_swap_before_any_change(node: Path) -> None:
    rootfs = _mount(node, ["2", "1"])
    line, upper = _line(rootfs), _upper(node)
    with open(f"{rootfs}/f", "rb"), pytest.raises(OSError, match="busy"):
        overlay.with_extra_lower(rootfs, f"{node}/diff")
    assert (_line(rootfs), _upper(node)) == (line, upper)


def test_container_with_a_written_layer_is_refused(node: Path) -> None:
    rootfs = _mount(node, ["2", "1"])
    (node / "rootfs/new").mkdir()
    with pytest.raises(ValueError, match="not empty"):
        overlay.describe(rootfs)


@pytest.mark.parametrize("diff", ["gone", "diff/f"])
def test_diff_that_is_no_directory_leaves_the_mount_alone(node: Path, diff: str) -> None:
    rootfs = _mount(node, ["2", "1"])
    line = _line(rootfs)
    with pytest.raises(OSError, match=diff):
        overlay.with_extra_lower(rootfs, f"{node}/{diff}")
    assert _line(rootfs) == line


def test_more_layers_than_a_page_of_options_holds_are_mounted(node: Path) -> None:
    layers = [str(number) for number in range(100, 280)]
    for layer in layers:
        trees.make_dirs(node / "snapshots" / layer, "fs")
    rootfs = _mount(node, [*layers, "1"], relative=True)
    line, described = _line(rootfs), overlay.describe(rootfs)
    overlay.with_extra_lower(rootfs, f"{node}/diff")
    longer = overlay.read_overlay(rootfs)
    assert longer.appended
    assert longer.lowerdirs == [
        f"{node}/diff", *(f"{node}/snapshots/{layer}/fs" for layer in [*layers, "1"])
    ]  # fmt: skip
    assert (node / "rootfs/f").read_bytes() == b"of the snapshot"
    overlay.remount(described)
    assert _line(rootfs) == line


def test_old_kernel_refuses_many_layers_before_any_change(
    node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rootfs = _mount(node, ["2", "1"])
    line = _line(rootfs)
    monkeypatch.setattr(overlay, "_PAGE", 100)
    monkeypatch.setattr(overlay, "_LOWERDIR_APPEND_SINCE", (99, 0))
    with pytest.raises(ValueError, match="too old"):
        overlay.with_extra_lower(rootfs, f"{node}/diff")
    assert _line(rootfs) == line


def test_layers_given_one_by_one_are_read_one_by_one(node: Path) -> None:
    rootfs = f"{node}/rootfs"
    with mounts.FsContext("overlay") as context:
        for name, value in (
            ("source", "overlay"), ("lowerdir+", f"{node}/snapshots/2/fs"),
            ("lowerdir+", f"{node}/snapshots/1/fs"), ("upperdir", f"{node}/snapshots/9/fs"),
            ("workdir", f"{node}/snapshots/9/work"), ("index", "off"),
        ):  # fmt: skip
            context.set(name, value)
        context.mount_at(rootfs, mounts.mount_attributes(["rw", "nodev", "relatime"]))
    line, described = _line(rootfs), overlay.describe(rootfs)
    overlay.with_extra_lower(rootfs, f"{node}/diff")
    assert (node / "rootfs/f").read_bytes() == b"of the snapshot"
    overlay.remount(described)
    assert _line(rootfs) == line


def test_layers_with_special_characters_in_names_are_mounted(node: Path) -> None:
    odd = "a:b,c\\d e=f\nä"
    escaped = odd.replace("\\", "\\\\")
    for name in ("fs", "work"):
        os.renames(node / "snapshots/9" / name, node / odd / "9" / name)
    os.renames(node / "snapshots/2/fs", node / odd / "2/fs")
    os.rename(node / "diff", node / odd / "diff")
    rootfs = f"{node}/rootfs"
    with mounts.FsContext("overlay") as context:
        for name, value in (
            ("lowerdir+", f"{node}/{odd}/2/fs"), ("upperdir", f"{node}/{escaped}/9/fs"),
            ("workdir", f"{node}/{escaped}/9/work"),
        ):  # fmt: skip
            context.set(name, value)
        context.mount_at(rootfs)
    described = overlay.describe(rootfs)
    assert described["upperdir"] == f"{node}/{odd}/9/fs"
    for appended in (True, False):
        mounts.unmount(rootfs)
        overlay.remount({**described, "appended": appended})
        overlay.with_extra_lower(rootfs, f"{node}/{odd}/diff")
        assert overlay.read_overlay(rootfs).upperdir == f"{node}/{odd}/9/fs"
        assert (node / "rootfs/f").read_bytes() == b"of the snapshot"


def test_mount_that_is_no_container_overlay_is_refused(node: Path) -> None:
    rootfs = f"{node}/rootfs"
    with pytest.raises(ValueError, match="0 mounts"):
        overlay.describe(rootfs)
    mounts.mount(f"{node}/diff", rootfs, "", mounts.MS_BIND)
    with pytest.raises(ValueError, match="not overlay"):
        overlay.describe(rootfs)
    mounts.unmount(rootfs)
    lower = f"lowerdir={node}/snapshots/2/fs:{node}/snapshots/1/fs"
    mounts.mount("overlay", rootfs, "overlay", 0, lower)
    with pytest.raises(ValueError, match="read-only"):
        overlay.describe(rootfs)


def test_relative_lowerdirs_outside_of_containerds_directory_are_refused(node: Path) -> None:
    rootfs = _mount(node, ["2", "1"], relative=True)
    os.rename(node / "snapshots/2", node / "snapshots/moved")
    with pytest.raises(ValueError, match="not in"):
        overlay.describe(rootfs)
