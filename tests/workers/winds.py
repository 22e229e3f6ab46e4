"""Runs the operations of a thread of the storm: at random, every change that memory allows.

A thread owns areas. An area that it works on is in none of its lists meanwhile, so that a process
that another thread forks at that moment takes over only certain areas. See `workers.storm`.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import shutil
import threading
import time
import zlib
from typing import TYPE_CHECKING, Final

from . import areas
from .areas import BOTH, DONTUNMAP, FIXED, MAYMOVE, NONE, PAGE, READ, Area, Wrong

if TYPE_CHECKING:
    from collections.abc import Callable

    from .storm import Process

SIZES: Final = (1, 2, 4, 8, 16, 32)
"""Pages of new areas: few sizes, so that threads get addresses that others gave back."""
MOST_AREAS: Final = 80
MOST_GROWN: Final = 256
_TRUE: Final = shutil.which("true") or "/bin/true"
_NESTED: Final = 120
_WEIGHTS: Final = {
    "read": 30, "write": 12, "poke": 10, "kernel_read": 5, "map": 10, "unmap": 8, "map_over": 6,
    "move": 12, "move_over": 6, "leave": 10, "dance": 8, "grow": 8, "shrink": 5, "shrink_away": 4,
    "drop": 12, "drop_unaligned": 2, "free": 6, "huge": 3, "protect": 6, "hand_over": 8, "brk": 1,
    "stack": 1, "spawn": 1, "execute": 1, "fork": 3,
}  # fmt: skip


def nested(depth: int) -> list[object]:
    """Returns nested lists, whose printing takes much of the C stack."""
    found: list[object] = []
    for _ in range(depth):
        found = [found]
    return found


class Wind:
    """A thread of the storm. name: unique in the storm; with the seed it sets the operations."""

    def __init__(self, process: Process, name: str, owned: list[Area]) -> None:
        self.process, self.name, self.areas = process, name, owned
        self.chance = random.Random(f"{process.seed} {name}")  # noqa: S311
        self.done: collections.Counter[str] = collections.Counter()
        self.recent: collections.deque[str] = collections.deque(maxlen=24)
        self.doing, self.since = "", time.monotonic()
        self.moving: tuple[Area, int] | None = None
        """An area that is just being moved, and its target."""
        self._label = zlib.crc32(f"{process.seed} {name}".encode()) << 24
        self._brk, self._pipe = 0, os.pipe()
        self._kinds = list(_WEIGHTS)
        self._weights = [_WEIGHTS[kind] for kind in self._kinds]

    def blow(self, until: float) -> None:
        """Run operations until a monotonic time, or until a failure. Body of a thread."""
        try:
            while time.monotonic() < until and not self.process.is_over:
                self.step(self.chance.choices(self._kinds, self._weights)[0])
        except Exception as error:  # noqa: BLE001 - every failure is reported
            self.process.wrong(self, error)
        finally:
            self.doing = ""
            for end in self._pipe:
                os.close(end)

    def step(self, kind: str) -> None:
        """Run an operation."""
        self.doing, self.since = kind, time.monotonic()
        operation: Callable[[], None] = getattr(self, f"do_{kind}")
        operation()
        self.done[kind] += 1

    # Areas

    def note(self, text: str) -> None:
        """Note an operation for the report of a failure."""
        self.doing = text
        self.recent.append(f"{time.monotonic():.6f} {text}")

    def labels(self, count: int) -> list[int]:
        """Returns labels of pages that are written now: unlike all before."""
        self._label += count
        return list(range(self._label - count + 1, self._label + 1))

    def take(self, most: int = 64, least: int = 1) -> Area:
        """Take an area, or a part, with at least `least` pages; the neighbours stay owned."""
        area = self._any()
        if len(area) < least:
            self.areas.append(area)
            area = self.new(least)
        size = self.chance.randint(least, min(most, len(area)))
        if self.chance.random() < 0.5 and len(area) <= most:
            return area
        first = self.chance.randint(0, len(area) - size)
        if first:
            area, rest = area.split(first), area
            self.areas.append(rest)
        if size < len(area):
            self.areas.append(area.split(size))
        return area

    def _any(self) -> Area:
        while len(self.areas) > MOST_AREAS:
            smallest = min(range(len(self.areas)), key=lambda at: len(self.areas[at]))
            area = self.areas.pop(smallest)
            self.check(area)
            areas.unmapped(area.address, len(area))
        if not self.areas:
            return self.new(self.chance.choice(SIZES))
        return self.areas.pop(self.chance.randrange(len(self.areas)))

    def new(self, pages: int) -> Area:
        """Map fresh memory: zeros."""
        address = areas.mapped(pages)
        self.note(f"map {address:#x} {pages}")
        return Area(address, [0] * pages)

    def check(self, area: Area, most: int = 4) -> None:
        """Verify some pages, mostly."""
        if self.chance.random() < 0.7:
            first = self.chance.randrange(len(area))
            area.verify(first, min(most, len(area) - first))

    def _range(self, area: Area, most: int) -> tuple[int, int]:
        first = self.chance.randrange(len(area))
        return first, self.chance.randint(1, min(most, len(area) - first))

    # Content

    def do_read(self) -> None:
        """Compare some pages."""
        area = self._any()
        area.verify(*self._range(area, 24))
        self.areas.append(area)

    def do_kernel_read(self) -> None:
        """Have the kernel read a page that may be missing."""
        area = self._any()
        area.verify_by_kernel(self.chance.randrange(len(area)), self._pipe)
        self.areas.append(area)

    def do_write(self) -> None:
        """Write whole pages."""
        area = self._any()
        first, count = self._range(area, 8)
        area.write(first, self.labels(count))
        self.areas.append(area)

    def do_poke(self) -> None:
        """Write a few bytes; the rest of the page stays, and is checked later."""
        area = self._any()
        area.poke(self.chance.randrange(len(area)), self.labels(1)[0])
        self.areas.append(area)

    def do_hand_over(self) -> None:
        """Give an area to another thread, and take an area of others."""
        market = self.process.market
        market.append(self._any())
        if len(market) > 1:
            self.areas.append(market.popleft())

    # Places

    def do_map(self) -> None:
        """Map a new area at the kernel's choice: a place that was just unmapped."""
        area = self.new(self.chance.choice(SIZES))
        if self.chance.random() < 0.5:
            area.write(0, self.labels(1))
        self.areas.append(area)

    def do_unmap(self) -> None:
        """Unmap an area, or a hole in an area."""
        area = self.take()
        self.check(area)
        self.note(f"unmap {area.address:#x} {len(area)}")
        areas.unmapped(area.address, len(area))

    def do_map_over(self) -> None:
        """Map a new area over a part of our own."""
        area = self.take()
        self.note(f"map over {area.address:#x} {len(area)}")
        areas.mapped(len(area), at=area.address)
        area.emptied(0, len(area))
        self.check(area)
        self.areas.append(area)

    def do_move(self) -> None:
        """Move an area to a place of our choice."""
        area = self.take()
        to = areas.mapped(len(area), NONE)
        self.moving = area, to
        self._move(area, len(area), FIXED, to)
        self.moving = None
        self.check(area)
        self.areas.append(area)

    def do_move_over(self) -> None:
        """Move an area over another area of ours."""
        area, over = self.take(32), self.take(32)
        size = min(len(area), len(over))
        for each in (area, over):
            if len(each) > size:
                self.areas.append(each.split(size))
        self._move(area, size, FIXED, over.address)
        self.check(area)
        self.areas.append(area)

    def do_leave(self) -> None:
        """Move an area at the kernel's choice, and keep the old place: with zeros."""
        area = self.take()
        old = Area(area.address, [0] * len(area))
        self._move(area, len(area), DONTUNMAP)
        self.check(area)
        self.check(old)
        self.areas += area, old

    def do_dance(self) -> None:
        """Move an area to and fro, as fast as possible: others get our place of a moment ago."""
        area = self.take(16)
        for _ in range(self.chance.randint(2, 6)):
            old = area.address
            self._move(area, len(area), DONTUNMAP)
            self.note(f"unmap {old:#x} {len(area)}")
            areas.unmapped(old, len(area))
        self.check(area)
        self.areas.append(area)

    def do_grow(self) -> None:
        """Grow an area, in place or elsewhere."""
        area = self.take()
        if len(area) < MOST_GROWN:
            more = self.chance.choice(SIZES)
            self._move(area, len(area) + more, 0)
            area.grown(more)
            self.check(area)
        self.areas.append(area)

    def do_shrink(self) -> None:
        """Shrink an area in place."""
        area = self.take(least=2)
        left = self.chance.randint(1, len(area) - 1)
        self._move(area, left, 0)
        area.split(left)
        self.areas.append(area)

    def do_shrink_away(self) -> None:
        """Move an area to a place of our choice, with fewer pages."""
        area = self.take(least=2)
        left = self.chance.randint(1, len(area) - 1)
        to = areas.mapped(left, NONE)
        self._move(area, left, FIXED, to)
        area.split(left)
        self.check(area)
        self.areas.append(area)

    def _move(self, area: Area, pages: int, flags: int, to: int = 0) -> None:
        self.note(f"move {area.address:#x} {len(area)} to {to:#x} {pages} flags {flags}")
        area.address = areas.remapped(area.address, len(area), pages, MAYMOVE | flags, to)
        self.note(f"moved to {area.address:#x}")

    # Advice

    def do_drop(self) -> None:
        """Drop pages (MADV_DONTNEED), sometimes by a size that is not whole pages."""
        area = self._any()
        first, count = self._range(area, 48)
        self.note(f"drop {area.at(first):#x} {count}")
        areas.advised(
            area.at(first), count * PAGE - self.chance.choice((0, 0, 100)), areas.DONTNEED
        )
        area.emptied(first, count)
        if self.chance.random() < 0.5:
            area.verify(first, min(count, 4))
        self.areas.append(area)

    def do_drop_unaligned(self) -> None:
        """Drop from the middle of a page (MADV_DONTNEED): the kernel must refuse."""
        area = self._any()
        try:
            areas.advised(area.address + 512, PAGE, areas.DONTNEED)
        except OSError:
            area.verify(0, 1)
            self.areas.append(area)
        else:
            raise Wrong("MADV_DONTNEED took half a page")

    def do_free(self) -> None:
        """Free pages lazily (MADV_FREE)."""
        area = self._any()
        first, count = self._range(area, 32)
        self.note(f"free {area.at(first):#x} {count}")
        areas.advised(area.at(first), count * PAGE, areas.FREE)
        area.freed(first, count)
        if self.chance.random() < 0.5:
            area.poke(first, self.labels(1)[0])
        self.areas.append(area)

    def do_huge(self) -> None:
        """Ask for huge pages, or for none."""
        area = self.take(1024)
        self.note(f"huge {area.address:#x} {len(area)}")
        advice = self.chance.choice((areas.HUGEPAGE, areas.HUGEPAGE, areas.NOHUGEPAGE))
        areas.advised(area.address, len(area) * PAGE, advice)
        self.areas.append(area)

    def do_protect(self) -> None:
        """Protect an area and unprotect it: the kernel splits the area, and may join it again."""
        area = self.take()
        self.note(f"protect {area.address:#x} {len(area)}")
        areas.protected(area.address, len(area), READ)
        self.check(area)
        areas.protected(area.address, len(area), BOTH)
        self.areas.append(area)

    # Processes, threads, the heap

    def do_brk(self) -> None:
        """Grow the heap a little."""
        if self._brk < 8:
            self._brk += 1
            with contextlib.suppress(OSError):  # an area of ours may lie behind the heap
                self.areas.append(Area(areas.heap_grown(4), [0] * 4))

    def do_stack(self) -> None:
        """Start a thread, whose stack another thread may have had."""
        thread = threading.Thread(target=lambda: repr(nested(_NESTED)))
        thread.start()
        thread.join()

    def do_spawn(self) -> None:
        """Start a program by vfork and exec."""
        self.note("spawn")
        self.process.expect(os.posix_spawn(_TRUE, [_TRUE], {}))

    def do_execute(self) -> None:
        """Start a program by fork and exec, while memory is still missing."""
        self.note("execute")
        if pid := os.fork():
            self.process.expect(pid)
            return
        try:
            os.execv(_TRUE, [_TRUE])
        finally:
            os._exit(3)

    def do_fork(self) -> None:
        """Fork a child that checks its memory, storms for a while, and ends somehow."""
        self.process.fork(self)
