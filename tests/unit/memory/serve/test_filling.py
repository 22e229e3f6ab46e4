"""The order of filling: on memory of this process that is registered as CRIU registers it."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from typing import TYPE_CHECKING, Final, Self

import pytest

from shim.memory.extents import Extents
from shim.memory.serve.filling import Filling
from shim.memory.serve.payload import Payload
from shim.memory.serve.space import AROUND_BYTES, Space
from tests.storm import uffd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PAGE: Final = mmap.PAGESIZE
SIZE: Final = 16 << 20
PID: Final = 1
pytestmark = pytest.mark.skipif(not uffd.is_available(), reason="no userfaultfd here")


def written(path: Path) -> bytes:
    content = b"".join(number.to_bytes(8, "little") * (PAGE // 8) for number in range(SIZE // PAGE))
    path.write_bytes(content)
    return content


class Memory:
    """16 MiB of memory of ours from `start` on, of which `register` makes an area."""

    def __init__(self) -> None:
        self.area = mmap.mmap(-1, SIZE + AROUND_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.area))
        self.start = -(-address // AROUND_BYTES) * AROUND_BYTES
        self.at = self.start - address
        self.fd = uffd.opened()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)  # before the area goes: that would be an event which nobody reads

    def register(self, begin: int = 0, end: int = SIZE) -> None:
        uffd.register(self.fd, self.start + begin, self.start + end)

    def present(self, begin: int, end: int) -> list[bool]:
        """Returns the flags of each page, without touching the page. Source:
        Documentation/admin-guide/mm/pagemap.rst.
        """
        with open("/proc/self/pagemap", "rb") as file:
            file.seek((self.start + begin) // PAGE * 8)
            return [bool(byte >> 7) for byte in file.read((end - begin) // PAGE * 8)[7::8]]

    def read(self, begin: int, end: int) -> bytes:
        return self.area[self.at + begin : self.at + end]

    def space(self, payload: Payload, extents: list[tuple[int, int, int]]) -> Space:
        missing = Extents((self.start + b, self.start + e, offset) for b, e, offset in extents)
        return Space(self.fd, PID, missing, payload, Extents())


@pytest.fixture
def content(tmp_path: Path) -> Iterator[tuple[Payload, bytes]]:
    """Yields a payload and its content."""
    path = tmp_path / "space-1.data"
    raw = written(path)
    with path.open("rb") as file:
        yield Payload(path.name, file.fileno(), SIZE, None), raw


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.002)


def test_working_set_is_filled_as_soon_as_its_area_is_registered(
    content: tuple[Payload, bytes],
) -> None:
    payload, raw = content
    filling = Filling()
    with Memory() as memory:
        early, late = (4 << 20, 5 << 20), (8 << 20, 9 << 20)
        first = [(PID, memory.start + begin, memory.start + end) for begin, end in (late, early)]
        filling.begin([*first, (PID + 1, 0, PAGE)], [(payload, 0, SIZE)])
        with filling.hold():
            filling.add(memory.space(payload, [(0, SIZE, 0)]))
        time.sleep(0.05)
        assert filling.error is None, "an area that is not there yet is no error"
        memory.register(0, 6 << 20)
        until(lambda: all(memory.present(*early)))
        time.sleep(0.05)
        assert not any(memory.present(0, early[0])), "the rest waits until the processes run"
        assert not any(memory.present(6 << 20, SIZE)), "nothing is filled where no area is"
        memory.register(6 << 20, SIZE)
        until(lambda: all(memory.present(*late)))
        filling.start()
        until(lambda: not filling.spaces[0].missing)
        with filling.hold():
            assert all(memory.present(0, SIZE))
        assert memory.read(0, SIZE) == raw
        filling.stop()
        assert filling.error is None


def test_fault_on_memory_without_content_also_gives_the_pages_behind(
    content: tuple[Payload, bytes],
) -> None:
    payload, raw = content
    with Memory() as memory:
        memory.register(0, AROUND_BYTES + 2 * PAGE)
        space = memory.space(payload, [(2 * PAGE, 3 * PAGE, 7 * PAGE)])
        asked: list[int] = []
        space.serve(memory.start + 5 * PAGE + 3, lambda _, address: asked.append(address))
        assert memory.present(0, 8 * PAGE) == [False, False, True, False, False, True, True, True]
        assert all(memory.present(5 * PAGE, AROUND_BYTES)), "fresh memory is used from its start on"
        assert not any(memory.present(AROUND_BYTES, AROUND_BYTES + 2 * PAGE))
        assert memory.read(2 * PAGE, 3 * PAGE) == raw[7 * PAGE : 8 * PAGE]
        assert not any(memory.read(5 * PAGE, AROUND_BYTES))
        space.serve(memory.start + AROUND_BYTES + PAGE, lambda _, address: asked.append(address))
        assert memory.present(AROUND_BYTES, AROUND_BYTES + 2 * PAGE) == [False, True], (
            "an area that ends before its neighbours do gets the page that is waited for"
        )
        assert asked == [memory.start + 5 * PAGE + 3], "what has no content is no working set"


def test_present_page_is_left_unchanged(content: tuple[Payload, bytes]) -> None:
    payload, raw = content
    with Memory() as memory:
        memory.register()
        space = memory.space(payload, [(PAGE, 2 * PAGE, 0)])
        space.serve(memory.start + PAGE, lambda *_: None)
        space.serve(memory.start, lambda *_: None)
        space.serve(memory.start + PAGE, lambda *_: None)
        assert memory.read(0, 2 * PAGE) == bytes(PAGE) + raw[:PAGE]
