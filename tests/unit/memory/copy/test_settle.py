"""A snapshot has no content of memory that a fork wipes, neither for CRIU nor for a page server."""

from dataclasses import replace
from pathlib import Path

import pytest

from protos import criu_pb2
from shim.contract.paths import SNAPSHOT_CRIU, SNAPSHOT_MEMORY
from shim.criu import pagemap
from shim.criu.pagemap import PAGE
from shim.kernel.smaps import FlaggedArea
from shim.memory.copy.copied import CopiedMemory
from shim.memory.copy.settle import settle
from tests.unit.criuimages import image
from tests.unit.memory.copy.test_forked import dumped

PID = 1
KEY, REST = b"key!" * (PAGE // 4), b"rest" * (PAGE // 4)
PLAIN, LOCKED = (10, 60), (150, 170)
"""Areas in pages. The page server fills the first, and CRIU the second, which is locked."""


@pytest.mark.parametrize("area", [PLAIN, LOCKED])
@pytest.mark.parametrize("flag", ["wf", "dp"])
def test_wiped_memory_is_in_no_file_of_a_snapshot(
    tmp_path: Path, area: tuple[int, int], flag: str
) -> None:
    for name in (SNAPSHOT_CRIU, SNAPSHOT_MEMORY):
        (tmp_path / name).mkdir()
    image(tmp_path / SNAPSHOT_CRIU / "pstree.img", criu_pb2.PstreeEntry(pid=PID, ppid=0))
    there = {11: REST, 155: REST} | {area[0] + 3: KEY}
    space = dumped(tmp_path, PID, there, [PLAIN, LOCKED])
    wiped = FlaggedArea(area[0] * PAGE, area[1] * PAGE, frozenset({flag}))
    settle(tmp_path, CopiedMemory([replace(space, areas=[wiped])], []))
    found = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in found
    assert REST in found
    listed = pagemap.read(tmp_path / SNAPSHOT_CRIU / f"pagemap-{PID}.img").pages
    assert not [each for each in listed if each.start < wiped.end and each.end > wiped.start]
