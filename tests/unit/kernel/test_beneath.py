"""A path never leads out of the directory beneath which it is opened."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from shim.kernel.beneath import empty_dir, open_beneath, open_dir, read_beneath, remove_tree

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("path", ["../secret", "d/../../secret", "/etc/passwd", "out", "out/secret",
                                  "d/self/secret", "proc/self/root/etc/passwd"])  # fmt: skip
def test_no_path_leads_out(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    (root / "d").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"")
    (root / "out").symlink_to(tmp_path)
    (root / "d/self").symlink_to(".")
    (root / "proc").symlink_to("/proc")
    with open_dir(str(root)) as dirfd, pytest.raises(OSError, match=r".") as refused:
        open_beneath(dirfd.fileno(), path).close()
    assert refused.value.errno in (errno.EXDEV, errno.ELOOP, errno.ENOENT)


def test_reading_is_bounded_and_never_blocks(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    os.mkfifo(tmp_path / "fifo")
    with open_dir(str(tmp_path)) as dirfd:
        assert read_beneath(dirfd.fileno(), "f", limit_bytes=5) == b"12345"
        with pytest.raises(OSError, match="longer than 4"):
            read_beneath(dirfd.fileno(), "f", limit_bytes=4)
        with pytest.raises(OSError, match="not a regular file"):
            read_beneath(dirfd.fileno(), "fifo", limit_bytes=4)


def test_removing_a_tree_follows_no_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"")
    tree = tmp_path / "tree"
    (tree / "a/b").mkdir(parents=True)
    (tree / "a/out").symlink_to(outside)
    os.mkfifo(tree / "a/b/fifo")
    with open_dir(str(tmp_path)) as dirfd:
        remove_tree(dirfd.fileno(), "tree")
        remove_tree(dirfd.fileno(), "tree")
    assert not tree.exists()
    with open_dir(str(outside)) as dirfd:
        assert os.listdir(outside) == ["kept"]
        empty_dir(dirfd.fileno())
    assert os.listdir(outside) == []
