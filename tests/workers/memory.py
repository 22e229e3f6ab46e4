"""A process with as much memory as wanted, whose every page can be verified.

    SIZE_MIB=1024 SEED=1 CONTENT=random PORT=8000 python3 -m workers.memory

The content follows from the seed: MiB blocks in rotation, each page stamped with its index and a
version.

    CONTENT=random       eight random blocks
    CONTENT=half-zero    the same, and every other block is written with zeros
    CONTENT=model        the blocks of the largest ONNX models in the image (of /opt/site)

    BACKING=private      anonymous memory of its own; nothing is file-backed
    BACKING=anonymous    shared anonymous memory
    BACKING=memfd        a memfd, mapped shared

    CHILDREN=8           forked when the memory is full; children only read the memory

    /health               200 when the memory is full
    /state                nonce, pid, hostname, uptime_s, requests, size_mib, touched, restored
    /checksum             compares every page: {"ok", "checksum", "bad_pages", "pages", "seconds"}
    /touch?n=N&seed=S     gives N pages a new version, spread by S; a later /checksum expects it
    /first                reads a single page: the time of a first answer does not depend on size
    /sample?n=N&seed=S    reads N pages, spread by S, and tells whether they are right
    /pauses               see `pauses`
    /children             every child compares every page: {"ok", "children"}
"""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import struct
import threading
import time
from array import array
from pathlib import Path
from typing import Final

from .pauses import Pauses
from .serving import (
    Ask,
    Identity,
    Json,
    LineLog,
    Reply,
    Server,
    port_from_environment,
    restored,
    stop_on_sigterm,
)

PAGE: Final = mmap.PAGESIZE
BLOCK: Final = 1 << 20
_PER_BLOCK: Final = BLOCK // PAGE
_STAMP: Final = struct.Struct("=QQ")
_ROTATION: Final = 8


def blocks_of(content: str, seed: int) -> list[bytes]:
    """Returns the blocks in rotation, a MiB each. b"" is a block of zeros. Raises ValueError."""
    source = random.Random(seed)  # noqa: S311  content to recognise, not a secret
    if content == "random":
        return [source.randbytes(BLOCK) for _ in range(_ROTATION)]
    if content == "half-zero":
        return [block for _ in range(_ROTATION) for block in (source.randbytes(BLOCK), b"")]
    if content == "model":
        return _blocks_of_models()
    raise ValueError(f"CONTENT={content}: random, half-zero and model are known")


def _blocks_of_models() -> list[bytes]:
    """Returns whole MiB of the models in /opt/site, the largest model first."""
    models = sorted(Path("/opt/site").rglob("*.onnx"), key=lambda path: -path.stat().st_size)
    blocks = [
        data[at : at + BLOCK]
        for data in (path.read_bytes() for path in models)
        for at in range(0, len(data) - BLOCK + 1, BLOCK)
    ]
    if not blocks:
        raise ValueError("CONTENT=model: there is no *.onnx of a MiB in /opt/site")
    return blocks


def area_of(backing: str, size: int) -> mmap.mmap:
    """Returns fresh memory. Raises ValueError."""
    match backing:
        case "private":
            return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        case "anonymous":
            return mmap.mmap(-1, size, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        case "memfd":
            fd = os.memfd_create("memory")
            os.ftruncate(fd, size)
            return mmap.mmap(fd, size, mmap.MAP_SHARED)
        case _:
            raise ValueError(f"BACKING={backing}: private, anonymous and memfd are known")


class Memory:
    """Memory with content that follows from (content, seed, size, touches)."""

    def __init__(
        self, size_mib: int, seed: int, content: str = "random", backing: str = "private"
    ) -> None:
        self.pages = size_mib * BLOCK // PAGE
        self.versions = array("Q", bytes(8 * self.pages))
        self.touched = 0
        self._lock = threading.Lock()
        self._blocks = blocks_of(content, seed)
        self._map = area_of(backing, max(size_mib, 1) * BLOCK)
        for index in range(size_mib):
            self._map[index * BLOCK : (index + 1) * BLOCK] = self._expected_block(index)

    def _expected_block(self, index: int) -> bytearray:
        there = self._blocks[index % len(self._blocks)]
        block = bytearray(there or BLOCK)
        first = index * _PER_BLOCK
        with memoryview(block) as octets, octets.cast("Q") as words:
            if there:
                words[:: PAGE // 8] = array("Q", range(first, first + _PER_BLOCK))
                words[1 :: PAGE // 8] = self.versions[first : first + _PER_BLOCK]
            else:  # a touched page of zeros has a stamp
                for page, version in enumerate(self.versions[first : first + _PER_BLOCK]):
                    if version:
                        _STAMP.pack_into(block, page * PAGE, first + page, version)
        return block

    def touch(self, count: int, seed: int) -> list[int]:
        """Give `count` pages their next version. Returns the pages, chosen by `seed`."""
        chosen = random.Random(seed).sample(range(self.pages), min(count, self.pages))  # noqa: S311
        with self._lock:
            for number in chosen:
                self.versions[number] += 1
                _STAMP.pack_into(self._map, number * PAGE, number, self.versions[number])
            self.touched += len(chosen)
        return chosen

    def page_is_right(self, number: int) -> bool:
        """Whether the stamp of a page is right; touches this page only."""
        stamp = _STAMP.unpack_from(self._map, number * PAGE)
        version = self.versions[number]
        zeros = not version and not self._blocks[number // _PER_BLOCK % len(self._blocks)]
        return bool(stamp == ((0, 0) if zeros else (number, version)))

    def verify(self) -> Json:
        """Compare every byte with its expected value. `checksum` is over the present bytes."""
        started, digest, bad = time.monotonic(), hashlib.sha256(), []
        with self._lock, memoryview(self._map) as view:
            for index in range(self.pages * PAGE // BLOCK):
                # A copy: memoryviews compare byte by byte, thirty times slower.
                there, expected = bytes(view[index * BLOCK :][:BLOCK]), self._expected_block(index)
                digest.update(there)
                if there != expected:
                    bad += _differing_pages(there, expected, index)
        return {
            "ok": not bad,
            "checksum": digest.hexdigest(),
            "bad_pages": bad[:16],
            "pages": self.pages,
            "seconds": round(time.monotonic() - started, 3),
        }

    def spoil(self, number: int) -> None:
        """Damage a page, for the test of the test."""
        self._map[number * PAGE + 100] ^= 0xFF


def _differing_pages(there: bytes, expected: bytearray, block: int) -> list[int]:
    return [
        block * _PER_BLOCK + page
        for page in range(_PER_BLOCK)
        if there[page * PAGE : (page + 1) * PAGE] != expected[page * PAGE : (page + 1) * PAGE]
    ]


class Child:
    """A forked process that compares all pages when asked."""

    def __init__(self, memory: Memory) -> None:
        self._lock = threading.Lock()
        theirs, self._ask = os.pipe()
        self._told, answer = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(theirs)
            os.close(answer)
            return
        try:
            os.close(self._ask)
            while os.read(theirs, 1):
                os.write(answer, b"+" if memory.verify()["ok"] else b"-")
        finally:
            os._exit(0)

    def is_right(self) -> bool:
        """Returns whether the child finds all pages right."""
        with self._lock:
            os.write(self._ask, b"?")
            return os.read(self._told, 1) == b"+"


class Worker:
    """The endpoints; the server runs from the start and answers 503 until the memory is full."""

    def __init__(self) -> None:
        self.me, self.log, self.pauses = Identity("memory"), LineLog(), Pauses()
        self.memory: Memory | None = None
        self.forked: list[Child] = []

    def _full(self) -> Memory:
        if self.memory is None:
            raise BlockingIOError(11, "the memory is still being filled")
        return self.memory

    def health(self, _: Ask) -> object:
        """Answer 200 when every page is written."""
        return Reply(503, {"ok": False}) if self.memory is None else {"ok": True}

    def state(self, _: Ask) -> Json:
        """Returns the proof of identity, and the size of the memory."""
        memory = self._full()
        return {
            **self.me.describe(),
            "size_mib": memory.pages * PAGE // BLOCK,
            "touched": memory.touched,
            "restored": restored(),
        }

    def checksum(self, _: Ask) -> Json:
        """Compare all pages."""
        return self._full().verify()

    def children(self, _: Ask) -> Json:
        """Ask one child after another."""
        right = [child.is_right() for child in self.forked]
        return {"ok": all(right), "children": len(right)}

    def touch(self, ask: Ask) -> Json:
        """Change pages."""
        return {"touched": len(self._full().touch(ask.whole("n"), ask.whole("seed", 0)))}

    def first(self, _: Ask) -> Json:
        """Read a page from the middle."""
        memory = self._full()
        return {"ok": memory.page_is_right(memory.pages // 2), "nonce": self.me.nonce}

    def sample(self, ask: Ask) -> object:
        """Read some pages from everywhere; answer 500 when a page is wrong."""
        memory = self._full()
        source = random.Random(ask.whole("seed", 0))  # noqa: S311
        chosen = [source.randrange(memory.pages) for _ in range(ask.whole("n", 8))]
        wrong = [number for number in chosen if not memory.page_is_right(number)]
        return Reply(500, {"wrong": wrong}) if wrong else {"ok": True, "nonce": self.me.nonce}

    def run(self) -> None:
        """Serve, fill, and stay."""
        routes = {
            "/health": self.health,
            "/state": self.state,
            "/checksum": self.checksum,
            "/touch": self.touch,
            "/first": self.first,
            "/sample": self.sample,
            "/pauses": self.pauses.answer,
            "/children": self.children,
        }
        Server("0.0.0.0", port_from_environment(), routes, self.log, self.me).start()  # noqa: S104
        stop_on_sigterm(self.log)
        started = time.monotonic()
        size_mib = int(os.environ.get("SIZE_MIB", "64"))
        content, backing = os.environ.get("CONTENT", "random"), os.environ.get("BACKING", "private")
        memory = Memory(size_mib, int(os.environ.get("SEED", "1")), content, backing)
        self.forked = [Child(memory) for _ in range(int(os.environ.get("CHILDREN", "0")))]
        self.memory = memory
        self.log.say(f"ready {size_mib} MiB filled in {time.monotonic() - started:.2f} s")
        threading.Event().wait()


if __name__ == "__main__":
    Worker().run()
