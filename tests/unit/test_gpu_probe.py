"""Parts of the GPU probe that can be wrong without a GPU: layouts, parsing, the owner of memory."""

import ctypes
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.gpu import driver, images, injected, procfs, scene

STAGED = procfs.Area(0x1000, 0x9000, "rw-p", 0, 0, "", {"Rss": 0x8000}, "rd wr")


@pytest.mark.parametrize(
    "arguments",
    [driver.LockArgs, driver.CheckpointArgs, driver.RestoreArgs, driver.UnlockArgs],
)
def test_the_drivers_argument_structures_have_the_size_of_cuda_h(
    arguments: type[ctypes.Structure],
) -> None:
    assert ctypes.sizeof(arguments) == 64


def test_a_gpu_pair_is_two_uuids_and_restore_arguments_begin_with_them() -> None:
    assert ctypes.sizeof(driver.GpuPair) == 32
    assert (driver.RestoreArgs.pairs.offset, driver.RestoreArgs.pairs_count.offset) == (0, 8)


def test_memory_from_before_is_not_attributed_to_the_driver() -> None:
    old = [replace(STAGED, start=0x3000, end=0x4000), replace(STAGED, start=0x8000, end=0xA000)]
    rest = [(area.start, area.end) for area in scene.without(STAGED, old)]
    assert rest == [(0x1000, 0x3000), (0x4000, 0x8000)], "the kernel joins neighbours"


def test_only_areas_that_grew_are_candidates() -> None:
    before = [replace(STAGED, sizes={"Rss": 0x7000})]
    assert procfs.grown(before, [STAGED], least=0x2000) == []
    assert procfs.grown([], [STAGED], least=0x2000) == [STAGED]


def test_the_areas_of_this_process_are_read_as_they_are() -> None:
    mine = procfs.areas(os.getpid())
    names = {line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines()}
    heap = next(area for area in mine if area.path == "[heap]")
    assert heap.kind == "[heap]"
    assert 0 < heap.rss <= heap.size
    assert len(names) * 0.8 < len(mine) < len(names) * 1.2


def test_criu_statistics_are_read_by_their_numbers(tmp_path: Path) -> None:
    message = bytes([0x08, 0xAC, 0x02, 0x10, 0x07, 0x38, 0x05])  # 1: 300, 2: 7, 7: 5
    entry = bytes([0x0A, len(message)]) + message
    path = tmp_path / "stats-dump"
    path.write_bytes(bytes(8) + len(entry).to_bytes(4, "little") + entry)
    assert images.stats(path) == {"freezing_us": 300, "frozen_us": 7, "pages": 5}


def test_a_process_made_to_call_madvise_goes_on_and_has_lost_its_pages() -> None:
    code = (
        "import mmap, sys; room = mmap.mmap(-1, 1 << 22, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "room[:] = bytes([7]) * (1 << 22); print('ready', flush=True)\n"
        "sys.stdin.readline(); print(sum(room[::4096]), flush=True)"
    )
    words = ["/usr/bin/python3", "-c", code]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        areas = [a for a in procfs.areas(child.pid) if a.kind == "anonymous" and a.rss >= 1 << 22]
        injected.madvise(child.pid, [(a.start, a.size) for a in areas], injected.DONTNEED)
        assert child.communicate("go\n", timeout=20)[0] == "0\n", "its memory is empty, it is not"
