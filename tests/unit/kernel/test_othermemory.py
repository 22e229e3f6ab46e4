"""Reading the memory of another process leaves it unchanged."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
import signal
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

from shim.kernel import othermemory, procfs
from shim.kernel.othermemory import PAGE, Buffer, Reader

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 8 << 20
JOB = 4 << 20
FAMILY = """
    import ctypes, mmap, os, sys
    SIZE, HUGE = int(sys.argv[1]), sys.argv[2] == "huge"
    area = mmap.mmap(-1, 2 * SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if HUGE:
        area.madvise(mmap.MADV_HUGEPAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    base = -(-base // (2 << 20)) * (2 << 20)
    ctypes.memmove(base, os.urandom(SIZE), SIZE)
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        sys.stdin.readline()
        os._exit(0)
    print(base, child, flush=True)
    sys.stdin.readline()
"""


class Family:
    """A process and its child, which share SIZE bytes from `base` on."""

    def __init__(self, kind: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-ISc", textwrap.dedent(FAMILY), str(SIZE), kind],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
        )  # fmt: skip
        assert self._process.stdout
        assert select.select([self._process.stdout], [], [], 20)[0], "the process says nothing"
        self.base, self.child = map(int, self._process.stdout.readline().split())
        self.pids = (self._process.pid, self.child)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.child, signal.SIGKILL)
        self._process.kill()
        self._process.communicate()

    def needs(self) -> int:
        """Returns the bytes of anonymous memory of both; shared memory counts once."""
        return sum(procfs.rollup(pid)["Pss_Anon"] for pid in self.pids)

    def read(self, pid: int) -> bytes:
        found = b""
        buffer = Buffer(JOB)
        with contextlib.closing(Reader(pid)) as reader:
            for start in range(self.base, self.base + SIZE, JOB):
                wanted = othermemory.vectors([(start, start + PAGE), (start + PAGE, start + JOB)])
                assert reader.read(wanted, JOB, buffer) == JOB
                found += bytes(buffer.view)
        return found


@pytest.fixture(params=["small", "huge"])
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    started = Family(request.param)
    try:
        yield started
    finally:
        started.end()


def test_reading_keeps_pages_shared_since_a_fork_shared(family: Family) -> None:
    before = family.needs()
    content = [family.read(pid) for pid in family.pids]
    assert content[0] == content[1]
    assert content[0].count(0) < SIZE // 128, "random bytes"
    assert family.needs() < before + (1 << 20)


def test_pinned_reading_copies_shared_pages(family: Family) -> None:
    """Else the test above shows nothing: this is why there are two ways."""
    before = family.needs()
    buffer = Buffer(JOB)
    for start in range(family.base, family.base + SIZE, JOB):
        wanted = othermemory.vectors([(start, start + JOB)])
        assert othermemory.read_pinned(family.child, wanted, JOB, buffer.address) == JOB
    assert family.needs() > before + SIZE // 2


@pytest.mark.parametrize("shared", [False, True])
def test_reading_ends_at_unmapped_memory(shared: bool) -> None:
    area = mmap.mmap(-1, 4 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.write(b"x" * 4 * PAGE)
    keeps, told = os.pipe()
    child = os.fork() if shared else 0
    if shared and not child:
        os.close(told)
        os.read(keeps, 1)
        os._exit(0)
    try:
        held = ctypes.c_char.from_buffer(area)
        address = ctypes.addressof(held)
        buffer = Buffer(4 * PAGE)
        hole = 1 << 46
        wanted = othermemory.vectors([(address, address + 2 * PAGE), (hole, hole + PAGE)])
        with contextlib.closing(Reader(os.getpid())) as reader:
            assert reader.read(wanted, 3 * PAGE, buffer) == 2 * PAGE
            assert bytes(buffer.view[: 2 * PAGE]) == b"x" * 2 * PAGE
            assert reader.read(othermemory.vectors([(hole, hole + PAGE)]), PAGE, buffer) == 0
    finally:
        os.close(told)
        os.close(keeps)
        if child:
            os.waitpid(child, 0)


def test_memory_of_a_process_that_executed_another_program_is_not_read() -> None:
    """The old memory of the process is gone, and nothing is known of the new memory."""
    with subprocess.Popen(
        [sys.executable, "-ISc", "import os; input(); os.execlp('sleep', 'sleep', '60')"],
        stdin=subprocess.PIPE, bufsize=0,
    ) as process:  # fmt: skip
        try:
            reader = Reader(process.pid)
            assert process.stdin
            process.stdin.write(b"\n")
            buffer = Buffer(PAGE)
            deadline = 200
            while b"sleep" not in procfs.comm(process.pid) and (deadline := deadline - 1):
                select.select([], [], [], 0.05)
            start, end = othermemory.own_areas(process.pid)[0]
            assert reader.read(othermemory.vectors([(start, start + PAGE)]), PAGE, buffer) == 0
            assert end > start
            reader.close()
        finally:
            process.kill()
