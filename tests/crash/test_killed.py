from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.crash.contents import state
from tests.crash.killing import killed_at
from tests.crash.operations import OPERATIONS, prepared, run, violations

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="module")
def original() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        prepared(Path(scratch) / "store")
        yield Path(scratch)


@contextmanager
def copied(original: Path) -> Iterator[Path]:
    """Yields a copy of the store for a crash. In memory: kill -9 loses no write."""
    copy = original / "copy"
    # Without close_fds this is posix_spawn, which returns when the program has started.
    command = ["/usr/bin/cp", "-a", str(original / "store"), str(copy)]
    subprocess.run(command, check=True, close_fds=False)
    try:
        yield copy
    finally:
        shutil.rmtree(copy)


@pytest.mark.parametrize("name", OPERATIONS)
def test_killed_at_any_system_call_every_snapshot_is_whole_or_absent(
    original: Path, name: str
) -> None:
    operation = OPERATIONS[name]
    killed, before, states = True, "", 0
    for step in itertools.count(1):
        with copied(original) as root:
            killed = killed_at(step, partial(run, operation, root))
            left = state(root)
            if left == before and killed:
                continue  # most system calls change nothing on the disk
            allowed = {operation.before, operation.after} if killed else {operation.after}
            assert violations(root, frozenset(allowed)) == [], f"killed at system call {step}"
            before, states = left, states + 1
        if not killed:
            break
    assert states > 10, "the operation was not interrupted: this test proves nothing"


def test_a_store_that_publishes_piece_by_piece_is_caught(original: Path) -> None:
    """Check by a mutation that the test above can fail."""
    publish = OPERATIONS["publish"]

    def in_pieces(staged: Path, target: Path, rename: Callable[..., None] = os.rename) -> None:
        if target.parent.name != "snapshots":
            rename(staged, target)
            return
        os.mkdir(target, 0o700)
        for name in os.listdir(staged):
            rename(f"{staged}/{name}", f"{target}/{name}")

    def mutated(root: Path) -> None:
        os.rename = in_pieces  # type: ignore[assignment] # only in the child, which will die
        run(publish, root)

    for step in itertools.count(1, 3):  # a half published snapshot stays so for six calls
        with copied(original) as root:
            killed = killed_at(step, partial(mutated, root))
            assert killed, "the mutated store ran to its end and the test saw no half snapshot"
            if len(os.listdir(root / "snapshots")) == 3:
                continue  # not begun
            if violations(root, frozenset({publish.before, publish.after})):
                break
