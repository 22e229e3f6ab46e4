"""Shared memory that CRIU has dumped becomes a payload; a part stays CRIU's."""

import os
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import criu_pb2
from shim.capture import checkpoint
from shim.capture.checkpoint import _only_criu_has
from shim.criu import pagemap
from shim.criu.images import DamagedImage
from shim.memory import layout
from shim.memory.copy.copied import CopiedSpace
from shim.memory.copy.sharedsettle import settle_shared
from shim.memory.layout import BadLayout, SharedLayout
from tests.unit.criuimages import image

PAGE: Final = 4096
MIB: Final = 1 << 20
ANON, SEGMENT, HUGETLB = 1 << 8, 1 << 10, 0x40000


class Dump:
    """A dump that is being made up."""

    def __init__(self, base: Path) -> None:
        self.criu, self.memory = base / "criu", base / "memory"
        self.criu.mkdir(parents=True)
        self.memory.mkdir()
        self.copied: list[CopiedSpace] = []

    def listed(self, shmid: int, pages_id: int, content: dict[int, bytes]) -> None:
        """The pages of an object, by offset, and their copy."""
        entries = [
            criu_pb2.PagemapEntry(vaddr=at, nr_pages=1, flags=pagemap.PRESENT)
            for at in sorted(content)
        ]
        head = criu_pb2.PagemapHead(pages_id=pages_id)
        list_of_pages = self.criu / f"pagemap-shmem-{shmid}.img"
        image(list_of_pages, head, *entries)
        there = [at for at in content if any(content[at])]  # in any order
        data = self.memory / f"shared-{shmid}.data"
        data.write_bytes(b"".join(content[at] for at in there))
        self.copied.append(
            CopiedSpace(
                shmid, data, pagemap.read(list_of_pages),
                sorted((at, at + PAGE, number * PAGE) for number, at in enumerate(there)),
                sorted((at, at + PAGE) for at in content if not any(content[at])),
            )
        )  # fmt: skip

    def settled(self) -> list[SharedLayout]:
        """Returns the content that a restore reads."""
        found = settle_shared(self.criu, self.copied)
        (self.memory / "layout.json").write_bytes(layout.encode([], found))
        return self.read().shared

    def read(self) -> layout.Layout:
        """Returns the present content of memory/."""
        small = {p.name: p.read_bytes() for p in self.memory.iterdir() if p.suffix != ".data"}
        sizes = {path.name: path.stat().st_size for path in self.memory.glob("*.data")}
        return layout.decode(small, sizes)

    def content(self, found: SharedLayout) -> dict[int, bytes]:
        """Returns the pages of an object that are to be filled."""
        data = (self.memory / found.data).read_bytes()
        return {
            at: data[offset + at - start :][:PAGE]
            for start, end, offset in found.extents
            for at in range(start, end, PAGE)
        }


@given(st.dictionaries(st.integers(0, 2000), st.integers(0, 2), min_size=256, max_size=600))
def test_content_other_than_zeros_comes_back(
    tmp_path_factory: pytest.TempPathFactory, pages: dict[int, int]
) -> None:
    dump = Dump(tmp_path_factory.mktemp("dump"))
    content = {
        number * PAGE: bytes(PAGE) if not kind else bytes([kind]) * (PAGE - 1) + b"\7"
        for number, kind in pages.items()
    }
    dump.listed(9, 3, content)
    image(dump.criu / "memfd.img", criu_pb2.MemfdInode(size=2001 * PAGE - 5, shmid=9))
    (found,) = dump.settled()
    assert (found.image, found.size) == ("pagemap-shmem-9.img", 2001 * PAGE)
    assert dump.content(found) == {at: page for at, page in content.items() if any(page)}
    # CRIU makes the object at its full size, and empty.
    assert pagemap.read(dump.criu / found.image) == pagemap.Pagemap(3, ())
    assert (dump.criu / "pages-3.img").stat().st_size == 0


def some(size: int = MIB) -> dict[int, bytes]:
    """Returns random content."""
    return {at: os.urandom(PAGE) for at in range(0, size, PAGE)}


def test_small_object_is_left_to_criu(tmp_path: Path) -> None:
    dump = Dump(tmp_path)
    content = {**some(MIB - 4 * PAGE), 2 * MIB: bytes(PAGE), 3 * MIB: b"x" * PAGE}
    dump.listed(1, 1, content)
    image(dump.criu / "memfd.img", criu_pb2.MemfdInode(size=4 * MIB, shmid=1))
    before = (dump.criu / "pagemap-shmem-1.img").read_bytes()
    assert dump.settled() == []
    assert (dump.criu / "pagemap-shmem-1.img").read_bytes() == before
    pages = b"".join(content[at] for at in sorted(content))
    assert (dump.criu / "pages-1.img").read_bytes() == pages
    assert {path.name for path in dump.memory.iterdir()} == {"layout.json"}


def test_criu_writes_objects_that_the_copy_lacks_or_cannot_identify(tmp_path: Path) -> None:
    dump = Dump(tmp_path)
    memfds = [criu_pb2.MemfdInode(size=MIB, shmid=number) for number in (1, 2, 5)]
    memfds[1].hugetlb_flag = 21 << 26
    image(dump.criu / "memfd.img", *memfds)
    areas = [
        criu_pb2.Vma(start=MIB, end=2 * MIB, pgoff=0, shmid=3, status=ANON, flags=HUGETLB),
        criu_pb2.Vma(start=MIB, end=2 * MIB, pgoff=MIB, shmid=4, status=ANON),
        criu_pb2.Vma(start=MIB, end=9 * MIB, pgoff=0, shmid=6, status=ANON | SEGMENT),
    ]
    image(dump.criu / "mm-1.img", criu_pb2.Mm(vmas=areas))
    segment = criu_pb2.IpcShm(desc=criu_pb2.IpcDesc(id=5), size=MIB, in_pagemaps=True)
    image(dump.criu / "ipcns-shm-11.img", segment)
    for number in range(1, 7):
        head = criu_pb2.PagemapHead(pages_id=10 + number)
        image(dump.criu / f"pagemap-shmem-{number}.img", head)
    # 2 and 3 are huge, two objects have the number 5, and CRIU knows no object 6.
    assert _only_criu_has(dump.criu, {1, 2, 3, 4, 5, 6}) == {12, 13, 15, 16}
    assert _only_criu_has(dump.criu, {4}) == {11, 12, 13, 15, 16}


@pytest.mark.parametrize(("copied", "dumps"), [({7}, 2), ({7, 8}, 1), (set(), 2)])
def test_second_dump_has_all_objects_of_criu_alone_and_there_is_no_third(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: set[int], dumps: int
) -> None:
    criu = tmp_path / "criu"
    criu.mkdir()
    done = []

    def dump(*_: object) -> None:
        """Writes two memfds, then a process, then 600 segments."""
        done.append(sorted(path.name for path in criu.glob("pages-*")))
        image(criu / "memfd.img", *[criu_pb2.MemfdInode(size=MIB, shmid=each) for each in (7, 8)])
        segments = range(100, 700)
        image(
            criu / "ipcns-shm-11.img",
            *[
                criu_pb2.IpcShm(desc=criu_pb2.IpcDesc(id=each), size=1, in_pagemaps=True)
                for each in segments
            ],
        )
        lists = ["shmem-7", "shmem-8", "1", *[f"shmem-{each}" for each in segments]]
        for number, name in enumerate(lists, 1):
            image(criu / f"pagemap-{name}.img", criu_pb2.PagemapHead(pages_id=number))
            with (criu / f"pages-{number}.img").open("wb") as file:  # as CRIU opens the image
                file.write(b"content")

    monkeypatch.setattr(checkpoint, "_run", dump)
    checkpoint.checkpoint(None, criu, [7], copied, unanswered="", until=0, thaw=int)  # type: ignore[arg-type]
    assert len(done) == dumps
    there = {path.name for path in criu.glob("pages-*")}
    objects = {7: 1, 8: 2} | {each: each - 96 for each in range(100, 700)}
    assert there >= {f"pages-{image}.img" for each, image in objects.items() if each not in copied}
    # CRIU may write the other content of a process; a copied object only if it came last.
    assert not there & {f"pages-{objects[each]}.img" for each in copied}
    assert all((criu / name).read_bytes() == b"content" for name in there)
    assert "pages-3.img" not in there or dumps == 1


def test_pages_beyond_the_end_are_damage(tmp_path: Path) -> None:
    dump = Dump(tmp_path)
    dump.listed(5, 1, some(2 * MIB))
    image(dump.criu / "memfd.img", criu_pb2.MemfdInode(size=MIB, shmid=5))
    with pytest.raises(DamagedImage):
        dump.settled()


@pytest.mark.parametrize(
    "wrong", [{"image": "../../x"}, {"image": "core-1.img"}, {"size": 4096}, {"size": "1"}, {}]
)
def test_layout_that_no_capture_writes_is_refused(tmp_path: Path, wrong: dict[str, object]) -> None:
    dump = Dump(tmp_path)
    dump.listed(5, 1, some())
    image(dump.criu / "memfd.img", criu_pb2.MemfdInode(size=MIB, shmid=5))
    (found,) = settle_shared(dump.criu, dump.copied)
    changed = {**found, **wrong} if wrong else {"image": found["image"]}
    (dump.memory / "layout.json").write_bytes(layout.encode([], [changed]))
    with pytest.raises(BadLayout):
        dump.read()
