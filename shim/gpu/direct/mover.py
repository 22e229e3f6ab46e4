"""Copies device memory to files and files to device memory, at what the bus takes. Lean.

The payload is the pieces one after the other, 4 MiB chunks dealt out to several files: one file
takes 3 GB/s whatever the threads, because they wait for its inode; sixteen take ten times that.
Each chunk is in one file, whole, at a place that follows from its number, so a chunk has a digest
in the listing of its file. A thread has two buffers, and reads into one while the device copies
the other.
"""

from __future__ import annotations

import ctypes
import os
import threading

from shim.contract.paths import DATA_SUFFIX
from shim.kernel.sha256 import hexdigest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shim.gpu.direct.device import DeviceMemory, Gpu

    Check = Callable[[int, int, memoryview], None]
    """Of a file's number, a chunk's in it, and the chunk: raises when it is not as it must be."""

CHUNK_BYTES = 4 << 20
FILES = 16


class PayloadDamaged(ValueError):
    """The payload is not as it was captured."""


def name(gpu: int, file: int) -> str:
    """Of a payload file, among the snapshot's files of memory."""
    return f"gpu{gpu}-{file:02d}{DATA_SUFFIX}"


class PiecePart:
    """A part of a piece that is in one chunk."""

    __slots__ = ("at", "octets", "piece")

    def __init__(self, piece: int, at: int, octets: int) -> None:
        self.piece, self.at, self.octets = piece, at, octets


class Chunk:
    """parts: what it is made of. file and number: where it is kept, CHUNK_BYTES times number."""

    __slots__ = ("file", "number", "octets", "parts")

    def __init__(self, parts: list[PiecePart], file: int, number: int) -> None:
        self.parts, self.file, self.number = parts, file, number
        self.octets = sum(part.octets for part in parts)


def layout(sizes: Sequence[int], files: int = FILES) -> list[Chunk]:
    """Every chunk of pieces of these sizes, in their order. All but the last are full."""
    chunks: list[Chunk] = []
    parts: list[PiecePart] = []
    room = CHUNK_BYTES

    def end() -> None:
        chunks.append(Chunk(parts, len(chunks) % files, len(chunks) // files))

    for piece, size in enumerate(sizes):
        at = 0
        while at < size:
            octets = min(room, size - at)
            parts.append(PiecePart(piece, at, octets))
            at, room = at + octets, room - octets
            if not room:
                end()
                parts, room = [], CHUNK_BYTES
    if parts:
        end()
    return chunks


class Ring:
    """Pinned memory for the threads of one GPU: two chunks each."""

    def __init__(self, gpu: Gpu, threads: int) -> None:
        self.gpu, self.threads = gpu, threads
        self._at = gpu.pinned(threads * 2 * CHUNK_BYTES)

    def buffers(self, thread: int) -> list[tuple[int, memoryview]]:
        """Addresses, and the same as memory."""
        return [self._buffer(self._at + (2 * thread + half) * CHUNK_BYTES) for half in (0, 1)]

    def _buffer(self, at: int) -> tuple[int, memoryview]:
        return at, memoryview((ctypes.c_char * CHUNK_BYTES).from_address(at)).cast("B")


class Move:
    """The copying of chunks by the threads of a ring. The first error ends it."""

    def __init__(self, ring: Ring, memory: Sequence[DeviceMemory], fds: Sequence[int]) -> None:
        self._ring, self._memory, self._fds = ring, memory, fds
        self._lock = threading.Lock()
        self._next = 0
        self._chunks: Sequence[Chunk] = ()
        self.error: BaseException | None = None
        self.ended = False

    def load(self, chunks: Sequence[Chunk], check: Check | None = None) -> None:
        """From the files to the device. Raises what a thread raised."""
        self._run(chunks, lambda thread: self._load(thread, check))

    def save(self, chunks: Sequence[Chunk]) -> None:
        """From the device to the files, which grow. Raises what a thread raised."""
        self._run(chunks, self._save)

    def _run(self, chunks: Sequence[Chunk], work: Callable[[int], None]) -> None:
        self._chunks, self._next = chunks, 0
        threads = [
            threading.Thread(target=self._guarded, args=(work, number), daemon=True)
            for number in range(self._ring.threads)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.ended = True
        if self.error is not None:
            raise self.error

    def _guarded(self, work: Callable[[int], None], number: int) -> None:
        try:
            self._ring.gpu.use()
            work(number)
        except BaseException as error:  # noqa: BLE001 - raised by whoever waits for the thread
            self.error = self.error or error

    def _take(self) -> Chunk | None:
        with self._lock:
            if self.error is not None or self._next >= len(self._chunks):
                return None
            chunk = self._chunks[self._next]
            self._next += 1
            return chunk

    def _load(self, thread: int, check: Check | None) -> None:
        gpu, buffers = self._ring.gpu, self._ring.buffers(thread)
        streams = [gpu.stream(), gpu.stream()]
        half = 0
        while (chunk := self._take()) is not None:
            gpu.wait(streams[half])
            host, buffer = buffers[half]
            part = buffer[: chunk.octets]
            _read(self._fds[chunk.file], part, chunk.number * CHUNK_BYTES)
            if check is not None:
                check(chunk.file, chunk.number, part)
            for each in chunk.parts:
                at = self._memory[each.piece].at + each.at
                gpu.to_device(at, host, each.octets, streams[half])
                host += each.octets
            half ^= 1
        for stream in streams:
            gpu.wait(stream)

    def _save(self, thread: int) -> None:
        gpu, buffers = self._ring.gpu, self._ring.buffers(thread)
        streams = [gpu.stream(), gpu.stream()]
        under_way: list[Chunk | None] = [None, None]
        half = 0
        while True:
            if (done := under_way[half]) is not None:
                gpu.wait(streams[half])
                part = buffers[half][1][: done.octets]
                _write(self._fds[done.file], part, done.number * CHUNK_BYTES)
            under_way[half] = chunk = self._take()
            if chunk is None and under_way[half ^ 1] is None:
                return
            host = buffers[half][0]
            for each in chunk.parts if chunk is not None else ():
                at = self._memory[each.piece].at + each.at
                gpu.to_host(host, at, each.octets, streams[half])
                host += each.octets
            half ^= 1


def _read(fd: int, into: memoryview, offset: int) -> None:
    while into:
        got = os.preadv(fd, [into], offset)
        if not got:
            raise PayloadDamaged(f"the payload ends at {offset}")
        into, offset = into[got:], offset + got


def _write(fd: int, part: memoryview, offset: int) -> None:
    while part:
        done = os.pwrite(fd, part, offset)
        part, offset = part[done:], offset + done


def compared(digests: Sequence[Sequence[str] | None]) -> Check:
    """A check against digests of each file's chunks, None for a file that something else vouches
    for. Raises Damaged, with the place.
    """

    def check(file: int, number: int, chunk: memoryview) -> None:
        known = digests[file]
        if known is not None and hexdigest(chunk) != known[number]:
            raise PayloadDamaged(f"file {file}, chunk {number}: other content than was captured")

    return check
