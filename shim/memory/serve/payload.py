"""Gives access to a file with the content of memory, by addresses in our own memory. Lean.

A file is mapped when it was hashed since the boot (see `shim.integrity.marks`) or has fs-verity:
the kernel then copies from the page cache, which all restores of a snapshot share. Any other file
is read into our own memory by the chunk, hashed there, and copied from there: nobody can change the
content between the check and the use.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import mmap
import os
import threading
from collections import OrderedDict

from shim.integrity.chunks import CHUNK_BYTES
from shim.kernel.libc import map_readable, populate_read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_KEPT_CHUNKS = 4
"""Checked chunks that are kept: one for each thread that fills, and the last for faults."""


class Damaged(Exception):
    """The content differs from the captured content, or cannot be read."""


class Payload:
    """Opens a file of content. Raises OSError.

    fd: stays the caller's. digests: SHA-256 of each chunk, in hexadecimal; None when the content
    needs no check.
    """

    def __init__(self, name: str, fd: int, size: int, digests: Sequence[str] | None) -> None:
        self.name, self.size, self._fd, self._digests = name, size, fd, digests
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, _Chunk] = OrderedDict()
        self._spare: list[mmap.mmap] = []
        self._checked: set[int] = set()
        self._map = map_readable(fd, size) if digests is None and size else 0

    @property
    def is_checked(self) -> bool:
        """Whether all of the content is known to be as captured."""
        return self._digests is None or len(self._checked) == len(self._digests)

    @contextlib.contextmanager
    def at(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        """Yields the address of the content at `offset`, and how many of `size` bytes are there.

        The address is valid in the `with`. Raises Damaged.
        """
        if self._digests is None:
            self._populate(offset, size)
            yield self._map + offset, size
            return
        chunk = self._acquire(offset // CHUNK_BYTES)
        try:
            begins = offset % CHUNK_BYTES
            yield chunk.address + begins, min(size, CHUNK_BYTES - begins)
        finally:
            self._release(chunk)

    def prepare(self, offset: int, size: int) -> None:
        """Have content that needs no check in our page tables, so in memory. Raises Damaged."""
        size = min(size, self.size - offset)
        if self._digests is None and size > 0:
            self._populate(offset, size)

    def check_rest(self) -> None:
        """Check the chunks that no process needed. Raises Damaged."""
        for index in range(len(self._digests or ())):
            if index not in self._checked:
                self._release(self._acquire(index))

    def _populate(self, offset: int, size: int) -> None:
        """Have the pages in our page tables: a copy that meets a missing page starts again."""
        try:
            populate_read(self._map + offset, size)
        except OSError as error:
            raise Damaged(f"{self.name} cannot be read at {offset}: {error.strerror}") from error

    def _acquire(self, index: int) -> _Chunk:
        with self._lock:
            chunk = self._kept.pop(index, None) or _Chunk(index, self._memory())
            chunk.users += 1
            self._kept[index] = chunk
        with chunk.lock:  # the first thread reads the chunk, the others wait for it
            if not chunk.is_checked:
                try:
                    self._read(chunk)
                except BaseException:
                    with self._lock:
                        chunk.users -= 1
                        self._kept.pop(index, None)
                    raise
                self._checked.add(index)
        return chunk

    def _release(self, chunk: _Chunk) -> None:
        with self._lock:
            chunk.users -= 1
            unused = [each for each in self._kept.values() if not each.users]
            for each in unused[: max(0, len(self._kept) - _KEPT_CHUNKS)]:
                del self._kept[each.index]
                self._spare.append(each.memory)

    def _memory(self) -> mmap.mmap:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        return self._spare.pop() if self._spare else mmap.mmap(-1, CHUNK_BYTES, flags)

    def _read(self, chunk: _Chunk) -> None:
        assert self._digests is not None  # noqa: S101 - only then there are chunks
        start = chunk.index * CHUNK_BYTES
        size = min(CHUNK_BYTES, self.size - start)
        view = memoryview(chunk.memory)[:size]
        done = 0
        while done < size:
            try:
                got = os.preadv(self._fd, [view[done:]], start + done)
            except OSError as error:
                raise Damaged(f"{self.name} cannot be read: {error.strerror}") from error
            if not got:
                raise Damaged(f"{self.name} ends at {start + done}, not at {self.size}")
            done += got
        found = hashlib.sha256(view).hexdigest()
        if found != self._digests[chunk.index]:
            raise Damaged(
                f"{self.name}, chunk {chunk.index}: expected SHA-256 "
                f"{self._digests[chunk.index][:16]}, found {found[:16]}"
            )
        chunk.is_checked = True


class _Chunk:
    """4 MiB of our own memory with a chunk's content. users: the threads that copy from it now."""

    __slots__ = ("address", "index", "is_checked", "lock", "memory", "users")

    def __init__(self, index: int, memory: mmap.mmap) -> None:
        self.index, self.memory, self.users = index, memory, 0
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.lock, self.is_checked = threading.Lock(), False
