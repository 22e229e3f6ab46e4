"""Memory that a fork wipes, and droppable memory, come back empty and of the same kind."""

from pathlib import Path

import pytest

from protos import criu_pb2
from shim.criu import advice, pagemap
from shim.criu.pagemap import PAGE
from shim.kernel.smaps import FlaggedArea
from tests.unit.criuimages import image

WIPED, DROPPABLE, ORDINARY = 1, 2, 3
PRIVATE, ANONYMOUS, DROP = 0x02, 0x20, 0x08
WIPE = 1 << 18


def mm(path: Path) -> Path:
    """Writes an image with three areas of four pages, as CRIU 4.1 knows them."""
    found = criu_pb2.Mm()
    for number in (WIPED, DROPPABLE, ORDINARY):
        vma = found.vmas.add()
        vma.start, vma.end = number << 20, (number << 20) + 4 * PAGE
        vma.flags, vma.status = PRIVATE | ANONYMOUS, 0
        for name in ("pgoff", "shmid", "prot"):
            setattr(vma, name, 0)
        vma.fd = -1
    image(path / "mm-1.img", found)
    return path / "mm-1.img"


def area(number: int, *flags: str, pages: int = 4) -> FlaggedArea:
    return FlaggedArea(number << 20, (number << 20) + pages * PAGE, frozenset(flags))


def test_image_gets_the_flags_that_criu_does_not_know(tmp_path: Path) -> None:
    path = mm(tmp_path)
    advice.complete(path, [area(WIPED, "wf"), area(DROPPABLE, "wf", "dp"), area(ORDINARY, "dd")])
    wiped, droppable, ordinary = pagemap.read_mm(path).vmas
    assert (wiped.flags, wiped.madv) == (PRIVATE | ANONYMOUS, WIPE)
    assert (droppable.flags, droppable.madv) == (DROP | ANONYMOUS, WIPE)
    assert (ordinary.flags, ordinary.madv) == (PRIVATE | ANONYMOUS, 0)


def test_image_stays_byte_for_byte_if_nothing_is_missing(tmp_path: Path) -> None:
    path = mm(tmp_path)
    before = path.read_bytes()
    advice.complete(path, [area(ORDINARY, "dd", "mg")])
    assert path.read_bytes() == before


def test_area_that_criu_lists_otherwise_makes_the_capture_fail(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="other bounds"):
        advice.complete(mm(tmp_path), [area(WIPED, "wf", pages=3)])


def test_wiped_memory_is_told_by_its_flags(tmp_path: Path) -> None:
    path = mm(tmp_path)
    assert advice.wiped(path) == []
    advice.complete(path, [area(WIPED, "wf"), area(DROPPABLE, "dp"), area(ORDINARY, "dd")])
    places = [(number << 20, (number << 20) + 4 * PAGE) for number in (WIPED, DROPPABLE)]
    assert advice.wiped(path) == places


@pytest.mark.parametrize(
    ("version", "known"),
    [("Version: 4.1.1", False), ("Version: 4.2", True), ("Version: 4.10", True),
     ("Version: 3.19", False), ("Version: 5.0", True), ("", False)],
)  # fmt: skip
def test_versions_that_know_both_kinds(version: str, known: bool) -> None:
    assert advice.is_known_to(version) == known
