"""Checks that memory stays right through every change, and that the storm finds a wrong server."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.storm import direct, planted, uffd
from tests.storm.hollow import Wishes
from tests.storm.serving import How
from tests.workers import areas
from tests.workers.areas import Area, Wrong
from tests.workers.storm import HANG_S

pytestmark = pytest.mark.skipif(
    not uffd.is_available(), reason="needs userfaultfd with events: root"
)
SEEDS = range(1000, 1006)
TRIES = 12


@pytest.mark.parametrize("seed", SEEDS)
def test_no_byte_is_wrong_and_nothing_hangs(seed: int) -> None:
    found = direct.run(*direct.chosen(seed, 1.5))
    assert (found.wrong, found.hangs) == ([], [])
    assert sum(found.operations.values()) > 20, "a storm without wind proves nothing"


@pytest.mark.parametrize("error", planted.ERRORS)
def test_an_error_of_the_server_is_found(error: str) -> None:
    wishes = Wishes(1, seconds=2.0, processes=1, threads=4, size_mib=16)
    how = How(piece_kib=16, pause_s=0.01, threads=2, plant=error)
    if error == "unanswered":  # the end of the server would wake the thread that waits
        how = replace(how, pause_s=1.0, slow_s=HANG_S + 5)
    for seed in range(1, 1 + TRIES):
        found = direct.run(replace(wishes, seed=seed), how)
        if not found.is_good:
            return
    pytest.fail(f"{TRIES} rounds found nothing wrong with {error}")


def test_a_round_leaves_nothing_behind() -> None:
    before = {path.name for path in Path("/tmp").glob("storm-*")}
    direct.run(*direct.chosen(1, 0.3))
    assert {path.name for path in Path("/tmp").glob("storm-*")} == before


# Checks of memory


@pytest.fixture
def area() -> Area:
    found = Area(areas.mapped(4), [0] * 4)
    found.write(0, [11, 12, 13, 14])
    return found


def test_an_area_knows_its_own_content(area: Area) -> None:
    area.verify()
    area.poke(1, 20)
    other = area.split(2)
    other.emptied(0, 0)
    area.verify()
    other.verify()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda area: areas.copied(area.at(1), area.at(2), areas.PAGE), "found stamp 0xd"),
        (lambda area: areas.mapped(1, at=area.at(1)), "found zeros"),
        (lambda area: areas.copied(area.at(1) + 100, area.at(1), 1), "garbage"),
    ],
)
def test_wrong_page_is_reported(area: Area, change: object, told: str) -> None:
    assert callable(change)
    change(area)
    with pytest.raises(Wrong, match=rf"page 1 of the area at .*expected stamp 0xc, .*{told}"):
        area.verify()


def test_freed_pages_may_be_what_they_were_or_zeros(area: Area) -> None:
    area.freed(0, 2)
    area.poke(1, 21)
    area.verify()
    areas.mapped(1, at=area.at(0))
    area.verify()
    areas.mapped(1, at=area.at(1))
    with pytest.raises(Wrong):  # a page that was written after it was freed is certain
        area.verify()


def test_the_kernel_reads_what_we_read(area: Area) -> None:
    pipe = os.pipe()
    area.verify_by_kernel(0, pipe)
    area.heads[0] = 5
    with pytest.raises(Wrong):
        area.verify_by_kernel(0, pipe)
    for end in pipe:
        os.close(end)
