"""The snapshot stores memory that forked processes share once, and every process gets its own
memory back.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

import pytest

from protos import criu_pb2
from shim.contract.paths import SNAPSHOT_CRIU, SNAPSHOT_MEMORY
from shim.criu import family, pagemap
from shim.criu.images import entries
from shim.criu.pagemap import PAGE
from shim.memory import layout
from shim.memory.copy import forked
from shim.memory.copy.copied import CopiedMemory, CopiedSpace
from shim.memory.copy.memorycopy import merge
from shim.memory.copy.settle import settle
from tests.unit.criuimages import image

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    Memory = dict[int, bytes]
    """The content of pages by number."""

ANONYMOUS, LOCKED = 0x22, 0x2022
AREAS: Final = [(10, 60), (60, 90), (100, 140), (150, 170)]
"""The last area is locked: CRIU's in any case."""


def dumped(staging: Path, pid: int, there: Memory, areas: Sequence[tuple[int, int]]) -> CopiedSpace:
    criu, data = staging / SNAPSHOT_CRIU, staging / SNAPSHOT_MEMORY / f"space-{pid}.data"
    vmas = [
        criu_pb2.Vma(
            start=start * PAGE, end=end * PAGE, pgoff=0, shmid=0, prot=3, status=0x201, fd=-1,
            flags=LOCKED if start == 150 else ANONYMOUS,
        )
        for start, end in areas
    ]  # fmt: skip
    image(criu / f"mm-{pid}.img", criu_pb2.Mm(vmas=vmas))
    listed, content, zeros, out = [], [], [], bytearray()
    for start, end in areas:
        lazy = 0 if start == 150 else pagemap.LAZY
        own = merge((at, at + 1) for at in there if start <= at < end)
        listed += [
            pagemap.Pages(first * PAGE, behind * PAGE, lazy | pagemap.PRESENT)
            for first, behind in own
        ]
    for at, page in sorted(there.items()):
        if page == bytes(PAGE):
            zeros.append((at * PAGE, (at + 1) * PAGE))
        else:
            content.append((at * PAGE, (at + 1) * PAGE, len(out)))
            out += page
    data.write_bytes(out)
    pages = pagemap.Pagemap(pid, tuple(listed))
    image(criu / f"pagemap-{pid}.img")
    pagemap.write(criu / f"pagemap-{pid}.img", pages)
    return CopiedSpace(pid, data, pages, content, zeros)


def entries_of(path: Path) -> tuple[int, list[criu_pb2.PagemapEntry]]:
    head, *rest = entries(path)
    found = list(map(criu_pb2.PagemapEntry.FromString, rest))
    return criu_pb2.PagemapHead.FromString(head).pages_id, found


def read(criu: Path, name: str, pid: int) -> Memory:
    """Returns the pages that CRIU reads itself."""
    pages_id, listed = entries_of(criu / f"{name}pagemap-{pid}.img")
    content = (criu / f"{name}pages-{pages_id}.img").read_bytes()
    found, at = {}, 0
    for each in listed:
        for number in range(each.vaddr // PAGE, each.vaddr // PAGE + each.nr_pages):
            if each.flags & pagemap.PRESENT:
                found[number] = content[at : at + PAGE]
                at += PAGE
    assert at == len(content)
    return found


def restored(staging: Path, pid: int) -> tuple[Memory, set[int]]:
    """Returns the memory that a process gets, and the pages of it that CRIU compares with its
    parent's.
    """
    criu, memory = staging / SNAPSHOT_CRIU, staging / SNAPSHOT_MEMORY
    small = {p.name: p.read_bytes() for p in memory.iterdir() if not p.name.endswith(".data")}
    sizes = {path.name: path.stat().st_size for path in memory.glob("*.data")}
    (space,) = (each for each in layout.decode(small, sizes).spaces if each.pid == pid)
    data, found, shared = (memory / space.data).read_bytes(), read(criu, "", pid), set()
    for each in entries_of(criu / f"pagemap-{pid}.img")[1]:
        numbers = range(each.vaddr // PAGE, each.vaddr // PAGE + each.nr_pages)
        if each.flags & pagemap.PARENT:
            earlier = read(criu, family.PREFIX, pid)
            found |= {number: earlier[number] for number in numbers}
            shared |= set(numbers)
        elif each.flags & pagemap.LAZY:
            found |= {number: bytes(PAGE) for number in numbers}
    for start, end, offset in space.extents:
        for at in range(start, end, PAGE):
            assert at // PAGE not in shared, "the page server leaves it to CRIU"
            found[at // PAGE] = data[offset + at - start :][:PAGE]
    return found, shared


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    (tmp_path / SNAPSHOT_CRIU).mkdir()
    (tmp_path / SNAPSHOT_MEMORY).mkdir()
    return tmp_path


def settled(
    staging: Path,
    memories: Mapping[int, Memory],
    parents: Mapping[int, int],
    areas: Mapping[int, Sequence[tuple[int, int]]] | None = None,
) -> None:
    tree = [criu_pb2.PstreeEntry(pid=pid, ppid=parent) for pid, parent in parents.items()]
    image(staging / SNAPSHOT_CRIU / "pstree.img", *tree)
    spaces = [
        dumped(staging, pid, its, (areas or {}).get(pid, AREAS)) for pid, its in memories.items()
    ]
    settle(staging, CopiedMemory(spaces, []))


def page(value: int) -> bytes:
    return random.Random(value).randbytes(PAGE) if value else bytes(PAGE)  # noqa: S311


@pytest.mark.parametrize("seed", range(40))
def test_every_process_gets_its_own_memory(
    staging: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forked, "WORTH_BYTES", 1)
    chance = random.Random(seed)  # noqa: S311
    numbers = [number for start, end in AREAS for number in range(start, end)]
    parents = {1: 0, 2: 1, 3: 1, 4: 2, 5: 4}
    memories: dict[int, Memory] = {}
    for pid, parent in parents.items():
        mine = dict(memories.get(parent, {number: page(number) for number in numbers}))
        for number in chance.sample(numbers, chance.choice((0, 5, 60))):
            mine[number] = page(chance.choice((0, 0, 1000 * pid + number)))
        for number in chance.sample(numbers, chance.choice((0, 3, 40))):
            mine.pop(number, None)
        memories[pid] = mine
    settled(staging, memories, parents)
    whole = {pid: restored(staging, pid) for pid in memories}
    assert {pid: found for pid, (found, _) in whole.items()} == memories
    for pid, parent in parents.items():
        for number in whole[pid][1] & whole[parent][1] if parent else ():
            assert memories[pid][number] == memories[parent][number]


def test_equal_pages_are_stored_once(staging: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked, "WORTH_BYTES", 1)
    memory = {number: page(number) for number in range(10, 90)}
    own = memory | {15: page(7)}
    settled(staging, {1: memory, 2: own, 3: memory}, {1: 0, 2: 1, 3: 1})
    kept = [p.stat().st_size for p in staging.glob(f"{SNAPSHOT_CRIU}/{family.PREFIX}pages-*")]
    assert kept == [80 * PAGE]
    data = {p.name: p.stat().st_size for p in staging.glob(f"{SNAPSHOT_MEMORY}/*.data")}
    assert data["space-1.data"] == data["space-3.data"] == 0
    assert restored(staging, 2) == (own, set(range(10, 90)) - {15})


def test_small_savings_are_left_to_the_page_server(staging: Path) -> None:
    memory = {number: page(number) for number in range(10, 90)}
    settled(staging, {1: memory, 2: memory}, {1: 0, 2: 1})
    assert not list(staging.glob(f"{SNAPSHOT_CRIU}/{family.PREFIX}*"))
    assert restored(staging, 2) == (memory, set())


def found_by_criu(criu: Path, parent: int, child: int) -> set[int]:
    """Returns the areas that CRIU takes for inherited, as CRIU goes through both lists."""
    theirs = [
        (v.start // PAGE, v.end // PAGE) for v in pagemap.read_mm(criu / f"mm-{parent}.img").vmas
    ]
    ours = [
        (v.start // PAGE, v.end // PAGE) for v in pagemap.read_mm(criu / f"mm-{child}.img").vmas
    ]
    found, one, other = set(), 0, 0
    while True:
        if ours[one] == theirs[other]:
            found.add(ours[one][0])
        while ours[one][0] <= theirs[other][0]:
            one += 1
            if one == len(ours):
                return found
        while theirs[other][0] < ours[one][0]:
            other += 1
            if other == len(theirs):
                return found


def test_criu_finds_an_area_behind_an_area_of_the_child_alone(
    staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forked, "WORTH_BYTES", 1)
    criu = staging / SNAPSHOT_CRIU
    memory = {number: page(number) for number in range(10, 90)}
    more = sorted([*AREAS, (5, 10), (97, 100)])
    settled(staging, {1: memory, 2: memory}, {1: 0, 2: 1}, {2: more})
    assert found_by_criu(criu, 1, 2) == {10, 60, 100, 150}
    added = [v for v in pagemap.read_mm(criu / "mm-1.img").vmas if v.start == v.end]
    assert [v.start // PAGE for v in added] == [5, 97]
    assert all(v.status == 0 for v in added), "nothing is mapped there"
