"""The copy of a container's memory equals its memory at the freeze."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import random
import select
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import criu_pb2
from shim.contract.paths import SNAPSHOT_CRIU, SNAPSHOT_MEMORY
from shim.criu import devnull, pagemap
from shim.kernel import othermemory, procfs
from shim.kernel.hugepages import HUGE_BYTES
from shim.memory import layout
from shim.memory.copy.copied import CopiedMemory, CopiedSpace
from shim.memory.copy.memorycopy import MemoryCopy, merge, without
from shim.memory.copy.settle import settle
from shim.memory.copy.spacecopy import FileRoom
from shim.memory.extents import joined
from tests.unit.criuimages import image

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = mmap.PAGESIZE
ROOT = Path(__file__).parents[4]
SLACK_BYTES = 64 << 10
"""Space that a file system may take beside the content."""
MAGIC = b"\x19\x43\x56\x54\x00\x00\x00\x00"
ranges = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9))).map(
    lambda found: merge((start, start + size) for start, size in found)
)


def points(found: list[tuple[int, int]]) -> set[int]:
    return {each for start, end in found for each in range(start, end)}


@given(ranges, ranges)
def test_subtraction_removes_only_known_ranges(
    wanted: list[tuple[int, int]], known: list[tuple[int, int]]
) -> None:
    left = list(without(wanted, known))
    assert points(left) == points(wanted) - points(known)
    assert left == sorted(left)
    assert all(start < end for start, end in left)


@given(ranges)
def test_merged_ranges_are_disjoint_and_do_not_touch(found: list[tuple[int, int]]) -> None:
    assert all(one[1] < other[0] for one, other in itertools.pairwise(found))
    assert merge(found) == found


# A process whose memory changes

CHILD = """
    import ctypes, mmap, os, random, sys
    PAGE = mmap.PAGESIZE
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int,
                          ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = libc.mremap.argtypes = libc.madvise.argtypes = None
    P, S = ctypes.c_void_p, ctypes.c_size_t
    PAGES = 2048
    base = libc.mmap(None, PAGES * PAGE, 3, 0x22, -1, 0)
    choose = random.Random(int(sys.argv[1]))
    def write(page):
        if choose.random() < 0.2:
            ctypes.memset(base + page * PAGE, 0, PAGE)
        else:
            ctypes.memmove(base + page * PAGE, choose.randbytes(PAGE), PAGE)
    for page in choose.sample(range(PAGES), PAGES // 2):
        write(page)
    moved = libc.mmap(None, 64 * PAGE, 3, 0x22, -1, 0)
    ctypes.memset(moved, 7, 64 * PAGE)
    hidden = libc.mmap(None, 4 * PAGE, 3, 0x22, -1, 0)
    ctypes.memset(hidden, 9, 4 * PAGE)
    libc.mprotect(P(hidden), S(4 * PAGE), 0)
    print(base, hidden, flush=True)
    sys.stdin.readline()
    for _ in range(choose.choice((0, 1, 40, 700))):
        page, size = choose.randrange(PAGES), choose.randint(1, 32)
        size = min(size, PAGES - page)
        match choose.randrange(8):
            case 0:
                libc.madvise(P(base + page * PAGE), S(size * PAGE), 4)
            case 1:
                libc.munmap(P(base + page * PAGE), S(size * PAGE))
                libc.mmap(P(base + page * PAGE), size * PAGE, 3, 0x32, -1, 0)
            case _:
                write(page)
    new = libc.mmap(None, 64 * PAGE, 0, 0x22, -1, 0)
    libc.mremap.restype = P
    libc.mremap(P(moved), S(64 * PAGE), S(64 * PAGE), 3, P(new))
    libc.madvise(P(base), S(8 * PAGE), 4)
    print("done", flush=True)
    sys.stdin.readline()
"""


class Process:
    """A process that has memory, changes it on request, and is then stopped."""

    def __init__(self, seed: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-ISc", textwrap.dedent(CHILD), str(seed)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
        )  # fmt: skip
        self.pid = self._process.pid
        self.base, self.hidden = map(int, self._line().split())

    def _line(self) -> bytes:
        assert self._process.stdout
        assert select.select([self._process.stdout], [], [], 20)[0], "the process says nothing"
        return self._process.stdout.readline()

    def change(self) -> None:
        assert self._process.stdin
        self._process.stdin.write(b"\n")
        assert self._line() == b"done\n"
        os.kill(self.pid, signal.SIGSTOP)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def areas(self) -> list[tuple[int, int, str]]:
        """Returns every private area without a file, and its permissions."""
        return [
            (*area.range, area.rights.decode())
            for area in procfs.areas(self.pid)
            if not area.inode
            and area.rights.endswith(b"p")
            and area.name[:3] in (b"", b"[he", b"[st")
        ]

    def there(self) -> dict[int, bytes]:
        """Returns every page of the areas that is in memory, by address."""
        found = {}
        with open(f"/proc/{self.pid}/mem", "rb", 0) as memory:
            areas = [(start, end) for start, end, _ in self.areas()]
            for start, end in othermemory.pages(self.pid, areas):
                for at in range(start, end, PAGE):
                    memory.seek(at)
                    found[at] = memory.read(PAGE)
        return found


@contextlib.contextmanager
def process(seed: int) -> Iterator[Process]:
    started = Process(seed)
    try:
        yield started
    finally:
        started.end()


def dumped(child: Process, number: int, criu: Path, there: dict[int, bytes]) -> None:
    """Writes CRIU's pagemap and areas. Executable and hidden areas are not lazy."""
    listed = []
    areas = child.areas()
    for start, end, rights in areas:
        lazy = pagemap.LAZY if rights == "rw-p" else 0
        own = merge((at, at + PAGE) for at in there if start <= at < end)
        listed += [
            criu_pb2.PagemapEntry(
                vaddr=first, nr_pages=(behind - first) // PAGE, flags=lazy | pagemap.PRESENT
            )
            for first, behind in own
        ]
    image(criu / f"pagemap-{number}.img", criu_pb2.PagemapHead(pages_id=1), *listed)
    vmas = [
        criu_pb2.Vma(start=start, end=end, flags=0x22 if rights == "rw-p" else 0x2022)
        for start, end, rights in areas
    ]
    image(criu / f"mm-{number}.img", criu_pb2.Mm(vmas=vmas))
    image(criu / "pstree.img", criu_pb2.PstreeEntry(pid=number, ppid=0))


def content_of(space: CopiedSpace) -> dict[int, bytes]:
    data = space.data.read_bytes()
    found = {
        at: data[offset + at - start : offset + at - start + PAGE]
        for start, end, offset in space.content
        for at in range(start, end, PAGE)
    }
    zeros = {at: bytes(PAGE) for start, end in space.zeros for at in range(start, end, PAGE)}
    assert not found.keys() & zeros.keys()
    return found | zeros


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    for part in (SNAPSHOT_CRIU, SNAPSHOT_MEMORY):
        (tmp_path / part).mkdir()
    return tmp_path


def copying(child: Process, staging: Path, within_s: float = 60) -> MemoryCopy:
    return MemoryCopy(child.pid, staging / SNAPSHOT_MEMORY, time.monotonic() + within_s)


@pytest.mark.parametrize("seed", range(12))
def test_copy_equals_memory_whatever_is_written_before_the_freeze(seed: int, staging: Path) -> None:
    criu = staging / SNAPSHOT_CRIU
    with process(seed) as child, copying(child, staging) as memory:
        memory.precopy([child.pid])
        assert memory.size > 1024 * PAGE
        child.change()
        there = child.there()
        memory.compare([child.pid])
        dumped(child, child.pid, criu, there)
        copied = memory.complete(criu)
    (space,) = copied.spaces
    found = content_of(space)
    assert found.keys() >= there.keys()
    assert {at for at in there if found[at] != there[at]} == set()
    assert sum(map(len, there.values())) > 1000 * PAGE
    settle(staging, copied)
    _check_settled(staging, child.pid, there)


def _check_settled(staging: Path, number: int, there: dict[int, bytes]) -> None:
    """Assert that the page server's part and CRIU's part together equal the memory."""
    criu, memory = staging / SNAPSHOT_CRIU, staging / SNAPSHOT_MEMORY
    small = {p.name: p.read_bytes() for p in memory.iterdir() if not p.name.endswith(".data")}
    sizes = {path.name: path.stat().st_size for path in memory.glob("*.data")}
    (found,) = layout.decode(small, sizes).spaces
    assert joined(found.extents) == found.extents, "a restore reads as few ranges as can be"
    data = (memory / found.data).read_bytes()
    filled = {
        at: data[offset + at - start :][:PAGE]
        for start, end, offset in found.extents
        for at in range(start, end, PAGE)
    }
    pages, own, lazy, offset = (criu / "pages-1.img").read_bytes(), {}, set(), 0
    listed = pagemap.read(criu / f"pagemap-{number}.img").pages
    for one, other in itertools.pairwise(listed):
        assert (one.end, one.flags) != (other.start, other.flags), "and CRIU few entries"
    for each in listed:
        for at in range(each.start, each.end, PAGE):
            if each.flags & pagemap.PRESENT:
                assert not each.flags & pagemap.LAZY
                own[at] = pages[offset : offset + PAGE]
                offset += PAGE
            else:
                lazy.add(at)
    assert offset == len(pages)
    assert own
    assert filled.keys() <= lazy
    assert own | {at: filled.get(at, bytes(PAGE)) for at in lazy} == there
    # Zeros need no room, unless they were none when they were copied first.
    assert sum(each == bytes(PAGE) for each in filled.values()) < len(filled) / 3
    assert (memory / found.data).stat().st_blocks * 512 <= len(filled) * PAGE + SLACK_BYTES


def test_copy_follows_processes_that_end_and_begin_before_the_freeze(staging: Path) -> None:
    criu, memory_directory = staging / SNAPSHOT_CRIU, staging / SNAPSHOT_MEMORY
    with process(1) as stays, process(2) as ends, process(3) as late:
        with MemoryCopy(stays.pid, memory_directory, time.monotonic() + 60) as memory:
            memory.precopy([stays.pid, ends.pid, 1 << 22])
            ends.end()
            for each in (stays, late):
                each.change()
            memory.compare([stays.pid, late.pid])
            there = {each.pid: each.there() for each in (stays, late)}
            for each in (stays, late):
                dumped(each, each.pid, criu, there[each.pid])
            spaces = memory.complete(criu).spaces
        assert {space.number for space in spaces} == there.keys()
        for space in spaces:
            found = content_of(space)
            assert all(found[at] == page for at, page in there[space.number].items())
    assert {path.name for path in memory_directory.iterdir()} == {
        f"space-{pid}.data" for pid in there
    }


def test_process_that_criu_dumps_unfrozen_is_a_failure(staging: Path) -> None:
    criu = staging / SNAPSHOT_CRIU
    with process(1) as child, copying(child, staging) as memory:
        child.change()
        memory.compare([child.pid])
        dumped(child, child.pid, criu, child.there())
        dumped(child, 7, criu, child.there())
        with pytest.raises(ValueError, match=r"other processes .*pagemap-7\.img"):
            memory.complete(criu)


def test_memory_in_too_many_pieces_is_a_failure_before_any_copy(staging: Path) -> None:
    criu = staging / SNAPSHOT_CRIU
    with process(1) as child, copying(child, staging) as memory:
        child.change()
        memory.compare([child.pid])
        with (criu / f"pagemap-{child.pid}.img").open("wb") as file:
            file.truncate(17 << 20)
        with pytest.raises(ValueError, match="too many pieces"):
            memory.complete(criu)


def test_unreadable_page_is_a_failure(staging: Path) -> None:
    criu = staging / SNAPSHOT_CRIU
    with process(1) as child, copying(child, staging) as memory:
        child.change()
        memory.compare([child.pid])
        dumped(child, child.pid, criu, {**child.there(), PAGE: b""})
        entry = criu_pb2.PagemapEntry(vaddr=PAGE, nr_pages=1, flags=pagemap.PRESENT)
        image(criu / f"pagemap-{child.pid}.img", criu_pb2.PagemapHead(pages_id=1), entry)
        with pytest.raises(ValueError, match="at 0x1000 cannot be read"):
            memory.complete(criu)


def test_page_missing_in_the_copy_is_a_failure(staging: Path) -> None:
    criu, data = staging / SNAPSHOT_CRIU, staging / SNAPSHOT_MEMORY / "space-1.data"
    data.write_bytes(b"x" * PAGE)
    entry = criu_pb2.PagemapEntry(vaddr=PAGE, nr_pages=2, flags=pagemap.PRESENT | pagemap.LAZY)
    image(criu / "pagemap-1.img", criu_pb2.PagemapHead(pages_id=1), entry)
    image(criu / "mm-1.img", criu_pb2.Mm(vmas=[]))
    image(criu / "pstree.img", criu_pb2.PstreeEntry(pid=1, ppid=0))
    listed = pagemap.read(criu / "pagemap-1.img")
    with pytest.raises(ValueError, match="not all of 0x1000 was copied"):
        settle(staging, CopiedMemory([CopiedSpace(1, data, listed, [(PAGE, 2 * PAGE, 0)], [])], []))


def test_copy_beyond_its_deadline_is_reported(staging: Path) -> None:
    with (
        process(1) as child,
        copying(child, staging, within_s=-1) as memory,
        pytest.raises(TimeoutError),
    ):
        memory.precopy([child.pid])


@given(st.lists(st.integers(0, 2 * HUGE_BYTES // PAGE), max_size=30))
def test_huge_content_is_aligned_to_huge_pages_and_nothing_overlaps(pages: list[int]) -> None:
    room, taken = FileRoom(), []
    for count in pages:
        offset, size = room.take(count * PAGE), count * PAGE
        taken.append((offset, offset + size))
        if size and size % HUGE_BYTES == 0:
            assert offset % HUGE_BYTES == 0
        assert offset + size <= room.end
    used = sorted(each for each in taken if each[0] < each[1])
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(used))
    huge = sum(count * PAGE % HUGE_BYTES == 0 for count in pages)
    assert room.end <= sum(pages) * PAGE + huge * HUGE_BYTES


def test_only_pages_of_zeros_are_found() -> None:
    buffer = othermemory.Buffer(8 * PAGE)
    ctypes.memset(buffer.address, 1, 8 * PAGE)
    for first, size in ((0, 1), (3, 2), (7, 1)):
        ctypes.memset(buffer.address + first * PAGE, 0, size * PAGE)
    # The page begins with zeros and does not end with them.
    ctypes.memset(buffer.address + 5 * PAGE, 0, PAGE - 1)
    expected = [(0, PAGE), (3 * PAGE, 5 * PAGE), (7 * PAGE, 8 * PAGE)]
    assert othermemory.zero_pages(buffer, 8 * PAGE) == expected
    assert othermemory.zero_pages(buffer, 4 * PAGE) == [(0, PAGE), (3 * PAGE, 4 * PAGE)]


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_pages_of_a_process_are_the_written_pages(written: list[bool]) -> None:
    own = mmap.mmap(-1, (len(written) + 1) * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(held := ctypes.c_char.from_buffer(own))
    for number, each in enumerate(written):
        if each:
            own[number * PAGE] = random.randrange(1, 256)  # noqa: S311
    found = othermemory.pages(os.getpid(), [(address, address + len(written) * PAGE)])
    expected = {address + number * PAGE for number, each in enumerate(written) if each}
    assert {at for start, end in found for at in range(start, end, PAGE)} == expected
    del held
    own.close()


PRESENT, SWAPPED, SOFT_DIRTY, FILE = 1 << 63, 1 << 62, 1 << 55, 1 << 61


@pytest.mark.parametrize(
    ("entries", "same"),
    [
        ([PRESENT, SWAPPED, PRESENT | FILE | 0x1234], True),
        ([PRESENT, PRESENT | SOFT_DIRTY, PRESENT], False),
        ([PRESENT, SWAPPED | SOFT_DIRTY, PRESENT], False),
        ([PRESENT, 0, PRESENT], False),
        ([PRESENT, PRESENT], False),
        ([], False),
    ],
)
def test_only_present_and_unwritten_pages_count_as_unchanged(
    entries: list[int], same: bool, tmp_path: Path
) -> None:
    (tmp_path / "pagemap").write_bytes(
        b"".join(each.to_bytes(8, "little") for each in [0, *entries])
    )
    watch = othermemory.WriteWatch.__new__(othermemory.WriteWatch)
    watch._fd = os.open(tmp_path / "pagemap", os.O_RDONLY)
    assert watch.is_as_it_was([(PAGE, 3 * PAGE), (3 * PAGE, 4 * PAGE)]) is same
    watch.close()


def test_writes_are_seen_or_tracking_is_reported_as_missing() -> None:
    buffer = othermemory.Buffer(64 * PAGE)
    buffer.view[:] = b"x" * (64 * PAGE)
    page = [(buffer.address + PAGE, buffer.address + 2 * PAGE)]
    watch = othermemory.WriteWatch(os.getpid())
    assert watch.is_as_it_was(page)
    buffer.view[PAGE] = 1
    assert watch.is_as_it_was(page) is not othermemory.can_watch()
    watch.close()


def test_image_links_to_dev_null_are_made_found_and_removed(tmp_path: Path) -> None:
    devnull.make(tmp_path, [1, 3, 4])
    (tmp_path / "pages-2.img").write_bytes(b"real")
    with open(tmp_path / "pages-1.img", "wb") as file:  # as CRIU opens the image
        file.write(bytes(PAGE))
    for number in (1, 2):
        image(tmp_path / f"pagemap-shmem-{number}9.img", criu_pb2.PagemapHead(pages_id=number))
    image(tmp_path / "pagemap-7.img", criu_pb2.PagemapHead(pages_id=3))
    assert devnull.of_objects(tmp_path) == {19: 1, 29: 2}
    assert devnull.of_processes(tmp_path) == {3}
    assert [number for number in range(6) if devnull.is_lost(tmp_path, number)] == [1, 3, 4]
    devnull.remove(tmp_path)
    assert devnull.without_content(tmp_path) == [tmp_path / "pagemap-shmem-19.img"]
    assert [path.name for path in tmp_path.glob("pages-*")] == ["pages-2.img"]
