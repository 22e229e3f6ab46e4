"""The judgement of the soak: a leak of one in ten cycles is seen, a late goodbye is none."""

import mmap
import os
from pathlib import Path

import pytest

from tests.soak import levels


def series(*values: int, level: str = "mounts") -> list[levels.Levels]:
    return [{level: value} for value in values]


def test_constant_level_is_no_growth() -> None:
    assert levels.grown(series(*[30] * 50, *[12] * 100)) == []


def test_late_release_is_no_growth() -> None:
    assert levels.grown(series(*[12 + number % 3 for number in range(150)])) == []


def test_leak_of_one_object_in_ten_cycles_is_found() -> None:
    (found,) = levels.grown(series(*[12 + number // 10 for number in range(150)]))
    assert (found.level, found.was, found.became) == ("mounts", 17, 24)
    assert "mounts grew from 17 to 24" in str(found)


@pytest.mark.parametrize(("per_cycle", "leaks"), [(1, False), (16, True)])
def test_memory_may_move_a_little(per_cycle: int, leaks: bool) -> None:
    values = [20_000 + number * per_cycle for number in range(1000)]
    assert bool(levels.grown(series(*values, level="daemon_memory_kib"))) is leaks


def test_memory_counts_written_pages_and_no_mapped_file(tmp_path: Path) -> None:
    path = tmp_path / "mapped"
    path.write_bytes(b"x" * (16 << 20))
    before = levels.memory_kib(os.getpid())
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) == ord("x") * (16 << 20) // mmap.PAGESIZE
        assert levels.memory_kib(os.getpid()) < before + (4 << 10)
        own = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        with mmap.mmap(-1, 16 << 20, own) as written:  # a heap may have as much to spare
            written.write(b"x" * (16 << 20))
            assert levels.memory_kib(os.getpid()) > before + (15 << 10)


def test_too_few_cycles_prove_nothing() -> None:
    with pytest.raises(ValueError, match="too few"):
        levels.grown(series(*[1] * (levels.LEAST - 1)))


@pytest.mark.parametrize("cycles", [50, 60, 99, 100, 200])
def test_every_allowed_number_of_cycles_finds_the_leak(cycles: int) -> None:
    leaks = series(*[12 + number // 10 for number in range(cycles)])
    (found,) = levels.grown(leaks)
    assert found.became > found.was
    flat = series(*[30] * levels.warm_up(cycles), *[12] * (cycles - levels.warm_up(cycles)))
    assert levels.grown(flat) == []
