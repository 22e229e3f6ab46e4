"""The filler of shared memory, with a process that does as CRIU does: make, map, ask, go on."""

import contextlib
import errno
import hashlib
import itertools
import mmap
import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest

from shim.integrity.chunks import CHUNK_BYTES
from shim.kernel import cgroup, hugepages, libc, survivors
from shim.kernel import process as kernel_process
from shim.memory.layout import SharedLayout
from shim.memory.serve import shared, sharedfill
from shim.memory.serve.fifos import Asked, NotFilled
from shim.memory.serve.payload import Damaged, Payload

PAGE: Final = 4096
MIB: Final = 1 << 20
IMAGE: Final = "pagemap-shmem-7.img"
HEAD: Final = b"head of the image"


class Restoring:
    """A process that restores a memfd of `size` bytes; its exit status is its result."""

    def __init__(self, view: Path, size: int, wanted: bytes, head: bytes = HEAD) -> None:
        self.go_fd, go = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            status = 3
            try:
                os.read(self.go_fd, 1)
                status = self._restore(view, size, wanted, head)
            finally:
                os._exit(status)
        os.close(self.go_fd)
        self.go_fd = go

    @staticmethod
    def _restore(view: Path, size: int, wanted: bytes, head: bytes) -> int:
        fd = os.memfd_create("made")
        os.ftruncate(fd, size)
        with mmap.mmap(fd, 0) as mapped:
            read = (view / IMAGE).read_bytes()
            if read != head:
                return 2
            return int(mapped[: len(wanted)] != wanted)

    def ended(self) -> int:
        """Let the process begin, and wait for its end."""
        os.write(self.go_fd, b".")
        os.close(self.go_fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a directory of images; the filler looks for no cgroup."""
    os.mkfifo(tmp_path / IMAGE)
    monkeypatch.setattr(cgroup, "charge_to", lambda _: None)
    return tmp_path


def payload(path: Path, content: bytes, *, hashed: bool, wrong: bool = False) -> Payload:
    (path / "data").write_bytes(content)
    chunks = [content[at : at + CHUNK_BYTES] for at in range(0, len(content), CHUNK_BYTES)]
    digests = [hashlib.sha256(chunk).hexdigest() for chunk in chunks]
    if wrong:
        digests[-1] = "0" * 64
    fd = os.open(path / "data", os.O_RDONLY)
    return Payload("data", fd, len(content), digests if hashed else None)


def started(
    view: Path,
    monkeypatch: pytest.MonkeyPatch,
    process: Restoring,
    found: SharedLayout,
    content: Payload,
) -> shared.Filler:
    monkeypatch.setattr(survivors, "newest_first", lambda _: [process.pid])
    asked = Asked("c", str(view), {IMAGE: HEAD})
    return shared.start("c", asked, [found], {"data": content})


def heard(filler: shared.Filler) -> None:
    """Wait until the filler has reported its outcome, and read the report."""
    select.select([filler], [], [], 10)
    filler.hear()


def refused(_address: int, _size: int) -> None:
    """Stands in for a kernel without a free huge page."""
    raise OSError(errno.ENOMEM, "no memory")


def refused_now_and_then() -> Callable[[int, int], None]:
    """Returns a `collapse` that finds a free huge page at every second call."""
    calls = itertools.count()

    def collapse(address: int, size: int) -> None:
        if next(calls) % 2:
            refused(address, size)
        libc.collapse(address, size)

    return collapse


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("collapse", [libc.collapse, refused, refused_now_and_then()])
def test_all_shared_memory_is_filled_before_the_process_goes_on(
    view: Path,
    monkeypatch: pytest.MonkeyPatch,
    collapse: Callable[[int, int], None],
    *,
    hashed: bool,
) -> None:
    monkeypatch.setattr(hugepages, "collapse", collapse)
    content = os.urandom(9 * MIB + 2 * PAGE)
    extents = [(PAGE, 3 * PAGE, 0), (MIB, 10 * MIB, 2 * PAGE)]
    size = 11 * MIB - 100
    wanted = bytearray(size)
    for start, end, offset in extents:
        wanted[start:end] = content[offset : offset + end - start]
    process = Restoring(view, size, bytes(wanted))
    found = SharedLayout(IMAGE, "data", extents, 11 * MIB)
    data = payload(view, content, hashed=hashed)
    filler = started(view, monkeypatch, process, found, data)
    with pytest.raises(NotFilled):
        filler.must_be_done()
    assert process.ended() == 0
    filler.must_be_done()
    heard(filler)
    assert filler.fileno() == -1, "it is gone, and nothing is left to be waited for"
    filler.end()


@pytest.fixture
def mapped() -> Iterator[tuple[mmap.mmap, int]]:
    """Makes an empty object of 64 MiB and a bit; returns its mapping and the address."""
    size = 64 * MIB + 3 * PAGE
    fd = os.memfd_create("object")
    os.ftruncate(fd, size)
    with mmap.mmap(fd, size) as own, libc.mapped_shared(fd, size, aligned=2 * MIB) as address:
        assert not address % (2 * MIB)
        yield own, address
    os.close(fd)


class Here(sharedfill.Threads):
    """The caller's thread."""

    def __init__(self) -> None:
        pass

    def run(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Run all jobs."""
        for job in jobs:
            job()


def pmd_mapped_kib() -> int:
    """Returns how much of our shared memory is mapped by huge pages."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("ShmemPmdMapped:"))


def test_whole_huge_pages_of_content_become_huge_pages(
    tmp_path: Path, mapped: tuple[mmap.mmap, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hugepages, "thread_time", lambda: 0.0)  # none comes slowly
    own, address = mapped
    content = os.urandom(64 * MIB + 3 * PAGE)
    found = SharedLayout(IMAGE, "data", [(0, len(content), 0)], len(content))
    sharedfill.fill(
        address, found, payload(tmp_path, content, hashed=False), Here()
    )  # fmt: skip
    assert own[:] == content
    assert pmd_mapped_kib() >= 48 << 10, "nearly all of it, where huge pages are free"


def test_huge_pages_take_no_memory_that_the_object_did_not_have(
    tmp_path: Path, mapped: tuple[mmap.mmap, int]
) -> None:
    own, address = mapped
    content = os.urandom(24 * MIB)
    # A page is missing in each but the last of twelve.
    extents = [(at * MIB, (at + 2) * MIB - PAGE, at * MIB) for at in range(0, 22, 2)]
    extents.append((22 * MIB, 24 * MIB, 22 * MIB))
    found = SharedLayout(IMAGE, "data", extents, len(own))
    sharedfill.fill(
        address, found, payload(tmp_path, content, hashed=False), Here()
    )  # fmt: skip
    assert all(own[start:end] == content[at : at + end - start] for start, end, at in extents)
    with open(f"/proc/self/map_files/{address:x}-{address + len(own):x}") as file:
        assert os.fstat(file.fileno()).st_blocks * 512 == 24 * MIB - 11 * PAGE


@pytest.mark.parametrize(("took_s", "made"), [(0.0001, 32), (0.02, 8)], ids=["quickly", "slowly"])
def test_huge_pages_are_given_up_when_the_kernel_is_slow(
    tmp_path: Path,
    mapped: tuple[mmap.mmap, int],
    monkeypatch: pytest.MonkeyPatch,
    took_s: float,
    made: int,
) -> None:
    own, address = mapped
    content = os.urandom(64 * MIB)
    calls: list[int] = []
    ticks = itertools.count()

    def collapse(at: int, size: int) -> None:
        calls.append(at)
        libc.collapse(at, size)

    monkeypatch.setattr(hugepages, "collapse", collapse)
    monkeypatch.setattr(hugepages, "thread_time", lambda: next(ticks) * took_s)
    found = SharedLayout(IMAGE, "data", [(0, len(content), 0)], len(own))
    sharedfill.fill(
        address, found, payload(tmp_path, content, hashed=False), Here()
    )  # fmt: skip
    assert own[: len(content)] == content
    assert len(calls) == made


def test_changed_content_ends_the_filler(view: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(6 * MIB)
    process = Restoring(view, 6 * MIB, content)
    found = SharedLayout(IMAGE, "data", [(0, 6 * MIB, 0)], 6 * MIB)
    filler = started(
        view, monkeypatch, process, found, payload(view, content, hashed=True, wrong=True)
    )
    assert process.ended() == 2, "the end of the image, and no image"
    with pytest.raises(Damaged, match="data, chunk 1"):
        heard(filler)
    filler.end()


def test_an_object_of_another_size_is_not_filled(
    view: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(MIB)
    process = Restoring(view, 2 * MIB, content)
    found = SharedLayout(IMAGE, "data", [(0, MIB, 0)], MIB)
    filler = started(view, monkeypatch, process, found, payload(view, content, hashed=False))
    assert process.ended() == 2
    with pytest.raises(NotFilled, match="0 objects fit"):
        heard(filler)
    filler.end()


def test_killed_filler_is_reported(view: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = Restoring(view, MIB, b"")
    found = SharedLayout(IMAGE, "data", [(0, MIB, 0)], MIB)
    filler = started(
        view, monkeypatch, process, found, payload(view, bytes(MIB), hashed=False)
    )  # fmt: skip
    os.kill(filler._pid, 9)
    with pytest.raises(NotFilled, match="killed"):
        heard(filler)
    filler.end()
    os.kill(process.pid, 9)
    os.waitpid(process.pid, 0)
    os.close(process.go_fd)


def test_process_that_ends_while_the_filler_works_for_it_is_crius_own_failure(
    view: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CRIU kills all processes when one of them fails, also the process that asks."""
    real = shared._object

    def of_a_killed(pid: int, size: int) -> int:
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):  # reaped already
            kernel_process.ends(pid, time.monotonic() + 30)
        return real(pid, size)

    monkeypatch.setattr(shared, "_object", of_a_killed)
    process = Restoring(view, MIB, b"")
    found = SharedLayout(IMAGE, "data", [(0, MIB, 0)], MIB)
    filler = started(view, monkeypatch, process, found, payload(view, bytes(MIB), hashed=False))
    assert process.ended() == -signal.SIGKILL
    heard(filler)
    assert filler.fileno() == -1, "it has ended, without a complaint"
    with pytest.raises(NotFilled, match="CRIU has not asked for all"):
        filler.must_be_done()
    filler.end()
