"""mountinfo is read as the kernel writes it, whatever names it has."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shim.kernel import mounts
from tests.unit import rootfs_trees as trees

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LINE = (
    rb"67 43 0:39 / /a\040b rw,relatime shared:7 master:3 - overlay overlay "
    rb'rw,context="system_u:object_r:container_file_t:s0:c1,c2",lowerdir=/l\134:1:/l2,uuid=on'
)
names = st.binary(min_size=1, max_size=60).filter(
    lambda name: not set(name) & {0, ord("/")} and name not in (b".", b"..")
)


def test_a_line_becomes_a_record() -> None:
    (mount,) = mounts.parse_mountinfo(LINE + b"\n")
    assert (mount.mount_id, mount.parent_id, mount.device) == (67, 43, "0:39")
    assert (mount.root, mount.target, mount.source) == ("/", "/a b", "overlay")
    assert mount.options == ("rw", "relatime")
    assert mount.propagation == ("shared:7", "master:3")
    assert list(mount.pairs()) == [
        ("rw", None), ("context", '"system_u:object_r:container_file_t:s0:c1,c2"'),
        ("lowerdir", "/l\\:1:/l2"), ("uuid", "on"),
    ]  # fmt: skip


@given(st.text())
def test_a_malformed_line_is_a_value_error(line: str) -> None:
    with pytest.raises((ValueError, IndexError)):
        mounts.parse_mountinfo(os.fsencode(line.replace("\n", "").replace(" - ", "") or "x"))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    with trees.own_mounts(tmp_path) as path:
        yield path


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=names)
def test_any_mount_point_is_found_again(place: Path, name: bytes) -> None:
    target = f"{place}/{os.fsdecode(name)}"
    os.mkdir(target)
    mounts.mount(target, target, "tmpfs", mounts.MS_NODEV | mounts.MS_RELATIME)
    try:
        (mount,) = mounts.mounts_at(target)
        assert (mount.source, mount.fstype) == (target, "tmpfs")
        assert mounts.mount_flags(mount.options) == mounts.MS_NODEV | mounts.MS_RELATIME
    finally:
        mounts.unmount(target)
        os.rmdir(target)


@pytest.mark.parametrize(
    "words", ["rw,relatime", "ro,nosuid,nodev,noexec,noatime", "rw", "rw,nodiratime,nosymfollow"]
)
def test_options_come_back_through_both_mount_calls(place: Path, words: str) -> None:
    options = words.split(",")
    mounts.mount("x", str(place), "tmpfs", mounts.mount_flags(options))
    with mounts.FsContext("tmpfs") as context:
        context.mount_at(str(place), mounts.mount_attributes(options))
    with_call, with_context = mounts.mounts_at(str(place))
    assert sorted(with_call.options) == sorted(with_context.options) == sorted(options)


def test_the_kernels_own_words_are_in_the_error(place: Path) -> None:
    with mounts.FsContext("tmpfs") as context, pytest.raises(OSError, match="bogus"):
        context.set("bogus", "1")
    with pytest.raises(OSError, match=str(place)):
        mounts.unmount(str(place))
