"""The memory worker notices every byte that is wrong, and no other."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.memory import BLOCK, PAGE, Memory


def test_same_seed_and_touches_give_the_same_checksum() -> None:
    one, other = Memory(3, seed=5), Memory(3, seed=5)
    assert one.touch(20, seed=1) == other.touch(20, seed=1)
    assert one.verify()["checksum"] == other.verify()["checksum"]


def test_a_touch_changes_the_checksum_and_stays_right() -> None:
    memory = Memory(2, seed=1)
    before = memory.verify()
    memory.touch(7, seed=2)
    after = memory.verify()
    assert after["ok"]
    assert after["checksum"] != before["checksum"]


@settings(deadline=None, max_examples=20)
@given(st.sets(st.integers(0, 2 * BLOCK // PAGE - 1), max_size=5))
def test_every_spoiled_page_is_named(spoiled: set[int]) -> None:
    memory = Memory(2, seed=1)
    for page in spoiled:
        memory.spoil(page)
    assert memory.verify()["bad_pages"] == sorted(spoiled)


def test_pages_of_all_blocks_differ() -> None:
    memory = Memory(9, seed=1)  # more by one than the blocks in rotation
    memory.touch(1, seed=0)
    assert all(memory.page_is_right(page) for page in range(memory.pages))
