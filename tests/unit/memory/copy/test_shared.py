"""The copy of a container's shared memory equals the memory at the freeze."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import signal
import time
from typing import TYPE_CHECKING, Final

import pytest

from protos import criu_pb2
from shim.contract.paths import SNAPSHOT_CRIU, SNAPSHOT_MEMORY
from shim.kernel import sharedobjects
from shim.kernel.sharedobjects import OpenObject
from shim.memory.copy.memorycopy import MemoryCopy
from tests.unit.criuimages import image
from tests.unit.memory.copy.test_memorycopy import content_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from shim.memory.copy.copied import CopiedSpace

PAGE: Final = mmap.PAGESIZE
PAGES: Final = 1200
IPC_CREAT, IPC_RMID, IPC_PRIVATE = 0o1000, 0, 0
PUNCH: Final = 0x03  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
libc: Final = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p


class Objects:
    """A process that has objects of shared memory: on request, it changes them, and is then
    stopped.

    paths: by name, for as long as the process has them.
    """

    def __init__(self, change: Callable[[Objects], None], seed: int = 0) -> None:
        self._choose = random.Random(seed)  # noqa: S311
        self._told, tell = os.pipe()
        ready, self._ready = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                os.close(tell)
                self._make()
                os.write(self._ready, b".")
                os.read(self._told, 1)
                change(self)
                os.write(self._ready, b".")
                signal.pause()
            finally:
                os._exit(1)
        os.close(self._told)
        os.close(self._ready)
        self._tell, self._hear = tell, ready
        assert os.read(ready, 1) == b"."

    def _make(self) -> None:
        self.open_fd = self.memfd("open", PAGES * PAGE)
        self.short_fd = self.memfd("short", PAGES * PAGE - 100)
        self.short = mmap.mmap(self.short_fd, PAGES * PAGE - 100)
        mapped = self.memfd("mapped", PAGES * PAGE)
        self.mapped = mmap.mmap(mapped, PAGES * PAGE)
        os.close(mapped)
        self.anonymous = mmap.mmap(-1, PAGES * PAGE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        segment = libc.shmget(IPC_PRIVATE, ctypes.c_size_t(3 * PAGE + 10), IPC_CREAT | 0o600)
        self.segment = libc.shmat(segment, None, 0)
        libc.shmctl(segment, IPC_RMID, None)
        self.fill(self.short)
        self.fill(self.mapped)
        self.fill(self.anonymous)
        for page in self._choose.sample(range(PAGES), PAGES // 2):
            os.pwrite(self.open_fd, self.content(), page * PAGE)
        ctypes.memset(self.segment, 5, 4 * PAGE)  # also behind the object's size, in its last page

    def memfd(self, name: str, size: int) -> int:
        """Returns a new memfd."""
        fd = os.memfd_create(name)
        os.ftruncate(fd, size)
        return fd

    def content(self) -> bytes:
        """Returns the content of a page: some pages are zeros."""
        return bytes(PAGE) if self._choose.random() < 0.2 else self._choose.randbytes(PAGE)

    def fill(self, area: mmap.mmap) -> None:
        """Write to some pages, the last among them."""
        for page in [*self._choose.sample(range(PAGES - 1), PAGES // 2), PAGES - 1]:
            size = min(PAGE, len(area) - page * PAGE)
            area[page * PAGE : page * PAGE + size] = self.content()[:size]

    def change(self) -> None:
        """Have the process change an object."""
        os.write(self._tell, b".")
        assert os.read(self._hear, 1) == b"."
        os.kill(self.pid, signal.SIGSTOP)

    def there(self) -> dict[int, dict[int, bytes]]:
        """Returns the content of all present pages, by object and offset."""
        found = {}
        for number, path in sharedobjects.found([self.pid]).items():
            opened = OpenObject(path)
            pages = {}
            for start, end in opened.pages():
                for at in range(start, end, PAGE):
                    page = memoryview(bytearray(PAGE))
                    assert opened.read(at, page) == PAGE
                    pages[at] = bytes(page)
            opened.close()
            found[number] = pages
        return found

    def end(self) -> None:
        """End the process, and close its pipes."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._tell)
        os.close(self._hear)


@contextlib.contextmanager
def objects(change: Callable[[Objects], None], seed: int = 0) -> Iterator[Objects]:
    found = Objects(change, seed)
    try:
        yield found
    finally:
        found.end()


def dumped(criu: Path, pid: int, there: dict[int, dict[int, bytes]]) -> None:
    """Writes the dump of CRIU: no process's own pages, and all of the objects."""
    image(criu / f"pagemap-{pid}.img", criu_pb2.PagemapHead(pages_id=1))
    for place, (number, pages) in enumerate(there.items()):
        entries = [criu_pb2.PagemapEntry(vaddr=at, nr_pages=1, flags=4) for at in pages]
        head = criu_pb2.PagemapHead(pages_id=2 + place)
        image(criu / f"pagemap-shmem-{number}.img", head, *entries)


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    for part in (SNAPSHOT_CRIU, SNAPSHOT_MEMORY):
        (tmp_path / part).mkdir()
    return tmp_path


def some_of_all(its: Objects) -> None:
    """Makes every kind of change to the content of an object, and none elsewhere."""
    its.fill(its.mapped)
    its.anonymous.madvise(mmap.MADV_REMOVE, 4 * PAGE, 400 * PAGE)
    libc.fallocate(its.open_fd, PUNCH, ctypes.c_long(0), ctypes.c_long(300 * PAGE))
    os.pwrite(its.open_fd, b"new", 7 * PAGE)
    os.truncate(its.short_fd, 500 * PAGE + 17)
    os.truncate(its.short_fd, PAGES * PAGE)
    ctypes.memset(its.segment + 3 * PAGE + 5, 6, PAGE - 5)


def nothing(_: Objects) -> None:
    """Leaves the objects unchanged."""


def others(its: Objects) -> None:
    """Closes an object and makes another, perhaps with the same number."""
    os.close(its.open_fd)
    new = its.memfd("new", 10 * PAGE)
    os.pwrite(new, b"x" * 5 * PAGE, 2 * PAGE)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("change", [some_of_all, nothing, others])
def test_copy_of_an_object_is_exact_whatever_happens_to_the_object(
    staging: Path, change: Callable[[Objects], None], seed: int
) -> None:
    criu, directory = staging / SNAPSHOT_CRIU, staging / SNAPSHOT_MEMORY
    with (
        objects(change, seed) as child,
        MemoryCopy(child.pid, directory, time.monotonic() + 60) as memory,
    ):
        memory.precopy([child.pid])
        assert len(list(directory.glob("shared-*"))) == 5
        child.change()
        there = child.there()
        assert memory.compare([child.pid]) == there.keys()
        dumped(criu, child.pid, there)
        copied = memory.complete(criu)
    assert {space.number for space in copied.shared} == there.keys()
    assert len(there) == 5
    assert sum(map(len, there.values())) > 1000
    for space in copied.shared:
        _check(space, there[space.number])
    names = {f"shared-{number}.data" for number in there} | {f"space-{child.pid}.data"}
    assert {path.name for path in directory.iterdir()} == names


def _check(space: CopiedSpace, there: dict[int, bytes]) -> None:
    found = content_of(space)
    assert {at for at, page in there.items() if found.get(at) != page} == set()


def test_objects_whose_content_criu_has_are_left_to_it(staging: Path) -> None:
    criu, directory = staging / SNAPSHOT_CRIU, staging / SNAPSHOT_MEMORY
    with (
        objects(nothing) as child,
        MemoryCopy(child.pid, directory, time.monotonic() + 60) as memory,
    ):
        memory.precopy([child.pid])
        child.change()
        there = child.there()
        memory.compare([child.pid])
        dumped(criu, child.pid, there)
        (criu / "pages-2.img").write_bytes(b"real")
        copied = memory.complete(criu)
    first, *rest = there
    assert {space.number for space in copied.shared} == set(rest)
    assert not (directory / f"shared-{first}.data").exists()


def test_unknown_object_is_a_failure(staging: Path) -> None:
    criu, directory = staging / SNAPSHOT_CRIU, staging / SNAPSHOT_MEMORY
    with (
        objects(nothing) as child,
        MemoryCopy(child.pid, directory, time.monotonic() + 60) as memory,
    ):
        child.change()
        memory.compare([child.pid])
        dumped(criu, child.pid, {1 << 40: {0: b""}})
        with pytest.raises(ValueError, match="nobody has the content of shared memory"):
            memory.complete(criu)


def test_a_file_that_only_looks_like_a_memfd_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "memfd:x"
    path.write_bytes(b"x" * PAGE)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), PAGE):
        link = f"/proc/self/fd/{file.fileno()}"
        assert os.readlink(link).endswith("/memfd:x")
        assert path.stat().st_ino not in sharedobjects.found([os.getpid()])


@contextlib.contextmanager
def many(count: int) -> Iterator[list[int]]:
    """Memfds."""
    fds = []
    try:
        fds += [os.memfd_create(f"of many {number}") for number in range(count)]
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def test_more_objects_than_a_usual_server_has_are_left_to_criu() -> None:
    with many(400) as fds:
        assert {os.fstat(fd).st_ino for fd in fds} <= sharedobjects.found([os.getpid()]).keys()
        with many(113):
            assert sharedobjects.found([os.getpid()]) == {}


def test_more_descriptors_than_a_usual_server_has_are_not_examined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sharedobjects, "_MOST_DESCRIPTORS", 100)
    with many(1), open(os.devnull, "rb") as file:
        assert sharedobjects.found([os.getpid()])
        here = len(os.listdir("/proc/self/fd"))
        copies = [os.dup(file.fileno()) for _ in range(101 - here)]
        try:
            assert sharedobjects.found([os.getpid()]) == {}
        finally:
            for fd in copies:
                os.close(fd)


def test_place_without_a_page_stays_without_a_page() -> None:
    fd = os.memfd_create("holes")
    os.ftruncate(fd, 8 * PAGE)
    os.pwrite(fd, b"x", 3 * PAGE)
    opened = OpenObject(sharedobjects.found([os.getpid()])[os.fstat(fd).st_ino])
    try:
        assert list(opened.pages()) == [(3 * PAGE, 4 * PAGE)]
        content = memoryview(bytearray(8 * PAGE))
        assert opened.read(0, content) == 8 * PAGE
        assert bytes(content) == bytes(3 * PAGE) + b"x" + bytes(5 * PAGE - 1)
        assert os.fstat(fd).st_blocks * 512 == PAGE
        assert opened.read(6 * PAGE, content[: 4 * PAGE]) == 2 * PAGE
        assert opened.read(9 * PAGE, content[:PAGE]) == 0
    finally:
        opened.close()
        os.close(fd)


def test_all_of_the_last_page_is_memory() -> None:
    with objects(nothing) as child:
        (segment,) = {
            path for path in sharedobjects.found([child.pid]).values()
            if os.readlink(path).startswith("/SYSV")
        }  # fmt: skip
        opened = OpenObject(segment)
        content = memoryview(bytearray(5 * PAGE))
        assert opened.read(0, content) == 4 * PAGE, "of 3 and 10 bytes"
        assert bytes(content) == b"\5" * 4 * PAGE + bytes(PAGE)
        opened.close()
