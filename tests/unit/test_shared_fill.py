"""What fills shared memory, with a process that does as CRIU does: make, map, ask, go on."""

import hashlib
import mmap
import os
import select
from pathlib import Path
from typing import Final

import pytest

from shim.integrity.chunks import CHUNK_BYTES
from shim.kernel import cgroup, survivors
from shim.memory import shared
from shim.memory.asked import Asked, NotFilled
from shim.memory.layout import SharedLayout
from shim.memory.payload import Damaged, Payload

PAGE: Final = 4096
MIB: Final = 1 << 20
IMAGE: Final = "pagemap-shmem-7.img"
HEAD: Final = b"head of the image"


class Restoring:
    """A process that restores one memfd of `size` bytes; what it did is its exit status."""

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
        """Let it begin, and wait for its end."""
        os.write(self.go_fd, b".")
        os.close(self.go_fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of images; no cgroup is looked for."""
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
    view: Path, monkeypatch: pytest.MonkeyPatch, process: Restoring, found: SharedLayout,
    content: Payload,
) -> shared.Filler:  # fmt: skip
    monkeypatch.setattr(survivors, "newest_first", lambda _: [process.pid])
    asked = Asked("c", str(view), {IMAGE: HEAD})
    return shared.start("c", asked, [found], {"data": content})


def heard(filler: shared.Filler) -> None:
    """Wait until it has told how it went, and take it up."""
    select.select([filler], [], [], 10)
    filler.hear()


@pytest.mark.parametrize("hashed", [False, True])
def test_all_of_it_is_there_before_the_process_goes_on(
    view: Path, monkeypatch: pytest.MonkeyPatch, *, hashed: bool
) -> None:
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


def test_what_is_not_what_was_captured_ends_it(view: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_one_that_is_killed_is_told(view: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
