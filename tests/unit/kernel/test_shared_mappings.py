"""Files that processes can change without a system call are found by the names that they have."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

import pytest

from shim.kernel.shared_mappings import writable_shared_files

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    "name",
    [b"plain", b"two words", b"\xff\r", b"line\nfeed", rb"not\012one", b"s \n", b"x (deleted)"],
)
def test_path_is_the_name_of_the_file(tmp_path: Path, name: bytes) -> None:
    path = os.fsencode(tmp_path) + b"/" + name
    with open(path, "wb+") as file:
        file.write(bytes(mmap.PAGESIZE))
        file.flush()
        with mmap.mmap(file.fileno(), mmap.PAGESIZE):
            assert os.fsdecode(path) in writable_shared_files([os.getpid()])
        with mmap.mmap(file.fileno(), mmap.PAGESIZE, prot=mmap.PROT_READ):
            assert os.fsdecode(path) not in writable_shared_files([os.getpid()])
        with mmap.mmap(file.fileno(), mmap.PAGESIZE, mmap.MAP_PRIVATE):
            assert os.fsdecode(path) not in writable_shared_files([os.getpid()])


def test_process_that_has_ended_has_no_files() -> None:
    assert writable_shared_files([2**22 + 1]) == set()
