"""A small file is replaced whole or not at all, and the writer leaves nothing beside the file."""

from __future__ import annotations

import os
import stat
import threading
from typing import TYPE_CHECKING

import pytest

from shim.kernel import replace
from shim.kernel.beneath import open_dir

if TYPE_CHECKING:
    from pathlib import Path


def scratch(name: str) -> str:
    return f".{name}.{os.getpid()}.new"


@pytest.mark.parametrize("umask", [0, 0o777])
def test_file_has_its_content_mode_and_owner_whatever_the_umask_is(
    tmp_path: Path, umask: int
) -> None:
    before = os.umask(umask)
    try:
        replace.put(f"{tmp_path}/a", "é", mode=0o400, owner=(7, 8), is_durable=True)
    finally:
        os.umask(before)
    status = (tmp_path / "a").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o400, 7, 8)
    assert (tmp_path / "a").read_text() == "é"
    assert os.listdir(tmp_path) == ["a"]


def test_path_may_begin_at_a_descriptor(tmp_path: Path) -> None:
    with open_dir(str(tmp_path)) as directory:
        replace.put("a", b"x", dir_fd=directory.fileno())
        assert (tmp_path / "a").read_bytes() == b"x"
        assert replace.take_away("a", dir_fd=directory.fileno())
        assert not replace.take_away("a", dir_fd=directory.fileno())


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    def fail() -> None:
        raise failure

    (tmp_path / "a").write_text("old")
    with pytest.raises(failure):
        replace.put(f"{tmp_path}/a", "new", written=fail)
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_scratch_file_of_a_killed_process_with_our_number_is_in_nobodys_way(
    tmp_path: Path,
) -> None:
    (tmp_path / scratch("a")).write_text("left, and longer than the new content")
    replace.put(f"{tmp_path}/a", "new")
    assert (tmp_path / "a").read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]


def test_planted_link_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("untouched")
    (tmp_path / scratch("a")).symlink_to("target")
    (tmp_path / "a").symlink_to("target")
    replace.put(f"{tmp_path}/a", "new")
    assert (tmp_path / "target").read_text() == "untouched"
    assert (tmp_path / "a").read_text() == "new"
    assert not (tmp_path / "a").is_symlink()


def test_scratch_files_have_names_that_a_sweep_knows() -> None:
    assert replace.is_scratch(scratch("node.key"))
    assert not any(map(replace.is_scratch, ("a.new", "node.key", ".hidden")))


def test_reader_sees_the_old_content_or_the_new_content(tmp_path: Path) -> None:
    path, seen = tmp_path / "a", set()
    replace.put(str(path), "0" * 10_000)
    ends = threading.Event()

    def read() -> None:
        while not ends.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for each in range(1, 200):
        replace.put(str(path), f"{each % 10}" * 10_000)
    ends.set()
    reader.join()
    assert seen
    assert all(len(text) == 10_000 and len(set(text)) == 1 for text in seen)
