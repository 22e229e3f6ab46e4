"""Compares the files that CRIU has opened with the held files, before a process runs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from shim.contract.errors import SnapshotDoesNotFit
from shim.contract.paths import CONTAINER_ANSWERED as ANSWERED
from shim.contract.paths import CONTAINER_ASKED as ASKED
from shim.gate.volumes import VolumeFile
from shim.kernel.procfs import numbers
from shim.restore.opened import Watch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HOLDS = """
import mmap, os, sys, time
fd = os.open(sys.argv[1], os.O_RDWR)
area = mmap.mmap(fd, 0)
address = next(line.split()[0] for line in open("/proc/self/maps") if sys.argv[1] in line)
print(fd, address, flush=True)
time.sleep(1000)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    return path


@pytest.fixture
def holder(file: Path) -> Iterator[tuple[int, str, str]]:
    """Yields a process that has the file open and mapped: its pid, and the places beneath
    /proc/PID.
    """
    argv = [sys.executable, "-ISE", "-c", HOLDS, str(file)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        fd, address = child.stdout.readline().split()
        yield child.pid, f"fd/{fd}", f"map_files/{address}"
        child.kill()


def watch(file: Path, at: list[Any], stack: contextlib.ExitStack, **changes: Any) -> Watch:
    status = file.stat()
    record = {
        "path": "/data/file", "mode": status.st_mode, "uid": status.st_uid, "gid": status.st_gid,
        "rdev": 0, "gone": False, "at": at,
    } | changes  # fmt: skip
    held = {"/data/file": (status.st_dev, status.st_ino)}
    return Watch(str(file.parent), [VolumeFile(**record)], held, stack, "c1")


def test_held_file_is_accepted_at_each_place(file: Path, holder: tuple[int, str, str]) -> None:
    pid, fd, mapping = holder
    number = numbers(pid)[-1]
    inner = mapping.split("/")[1].split("-")
    moved = f"map_files/{inner[0]}-{int(inner[1], 16) + 4096:x}"
    with contextlib.ExitStack() as stack:
        at = [[number, fd], [number, mapping], [number, moved]]
        assert watch(file, at, stack).difference(pid) == ""
        assert watch(file, at, stack, gone=True).difference(pid) == ""


def test_every_other_file_is_reported(file: Path, holder: tuple[int, str, str]) -> None:
    pid, fd, mapping = holder
    number = numbers(pid)[-1]
    with contextlib.ExitStack() as stack:
        assert "is not open" in watch(file, [[number, "fd/99"]], stack).difference(pid)
        assert "has mode" in watch(file, [[number, fd]], stack, mode=0o100000).difference(pid)
        gone = watch(file, [[number, fd]], stack, gone=True, uid=77)
        assert "belongs to" in gone.difference(pid)
        file.rename(file.with_name("away"))
        file.write_bytes(bytes(4096))
        for place in (fd, mapping):
            told = watch(file, [[number, place]], stack).difference(pid)
            assert "another file" in told


@pytest.mark.parametrize(("link", "answer"), [("", "yes"), ("fd/99", "no")])
def test_every_question_is_answered(
    file: Path, holder: tuple[int, str, str], link: str, answer: str
) -> None:
    """The script asks in this way, and CRIU 4.1 runs the script twice."""
    pid, fd, _ = holder
    ask = (
        f'cd "$1" && for i in 1 2; do echo {pid} >{ASKED}; read -r answer <{ANSWERED}; '
        f'[ "$answer" = {answer} ] || exit 7; done'
    )
    with contextlib.ExitStack() as stack:
        looking = watch(file, [[numbers(pid)[-1], link or fd]], stack)
        with subprocess.Popen(["/bin/sh", "-c", ask, "ask", str(file.parent)]) as runtime:
            looking.serve(runtime.pid, time.monotonic() + 20)
        assert runtime.returncode == 0
        if answer == "yes":
            looking.judge(is_restored=True)
        else:
            with pytest.raises(SnapshotDoesNotFit, match="is not open"):
                looking.judge(is_restored=False)


def test_process_that_ended_while_criu_asked_is_left_to_crius_own_error(
    file: Path, holder: tuple[int, str, str]
) -> None:
    """CRIU kills its processes when one of them fails: the missing one is no other file."""
    pid, fd, _ = holder
    ask = f'cd "$1"; echo {pid} >{ASKED}; read -r answer <{ANSWERED}; [ "$answer" = no ]'
    with contextlib.ExitStack() as stack:
        looking = watch(file, [[1 << 22, fd]], stack)
        with subprocess.Popen(["/bin/sh", "-c", ask, "ask", str(file.parent)]) as runtime:
            looking.serve(runtime.pid, time.monotonic() + 20)
        assert runtime.returncode == 0
        looking.judge(is_restored=False)
        with pytest.raises(SnapshotDoesNotFit, match="process is not there"):
            looking.judge(is_restored=True)


def test_runtime_that_never_asks_is_refused(file: Path) -> None:
    with contextlib.ExitStack() as stack:
        looking = watch(file, [], stack)
        with subprocess.Popen(["/bin/true"]) as runtime:
            looking.serve(runtime.pid, time.monotonic() + 20)
        looking.judge(is_restored=False)
        with pytest.raises(SnapshotDoesNotFit, match="has not run the script"):
            looking.judge(is_restored=True)


def test_the_deadline_ends_the_wait(file: Path) -> None:
    with contextlib.ExitStack() as stack:
        began = time.monotonic()
        watch(file, [], stack).serve(os.getpid(), began + 0.2)
        assert time.monotonic() - began < 10
