"""Records all writes to a disk: a file on a FUSE file system of our own.

A loop device over that file sends every write here as it happens, and every flush of its cache as
an fsync, in the order in which a real disk would see them. A disk may reorder or lose only writes
between two flushes. Speaks FUSE itself, for a single file. Source: linux/fuse.h.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import stat
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.node.kernel import die_with_parent, mount

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BLOCK = 4096
NAME = "disk"
_MAX_WRITE = 128 << 10
_ROOT, _FILE = 1, 2
_IN, _OUT = struct.Struct("=IIQQIIIHH"), struct.Struct("=IiQ")
_RECORD = struct.Struct("=cQI")
_LOOKUP, _FORGET, _GETATTR, _SETATTR, _OPEN, _READ, _WRITE = 1, 2, 3, 4, 14, 15, 16
_RELEASE, _FSYNC, _FLUSH, _INIT, _BATCH_FORGET = 18, 20, 25, 26, 42
_FOPEN_DIRECT_IO = 1


@dataclass(frozen=True, slots=True)
class Write:
    """A block that was written. data: BLOCK bytes or less."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Flush:
    """All earlier writes are durable."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A message of the writer at this moment."""

    text: str


Event = Write | Flush | Mark


class Disk:
    """The disk while it is served. path: its file."""

    def __init__(self, path: Path, log_fd: int, mark_fd: int) -> None:
        self.path, self._log_fd, self._mark_fd = path, log_fd, mark_fd

    def mark(self, text: str) -> None:
        """Record `text` between the earlier and the later writes."""
        os.write(self._mark_fd, text.encode())
        os.read(self._mark_fd, 1)

    def events(self) -> Iterator[Event]:
        """Yields the events so far, writes cut into blocks."""
        data, at = os.pread(self._log_fd, os.fstat(self._log_fd).st_size, 0), 0
        while at < len(data):
            kind, offset, length = _RECORD.unpack_from(data, at)
            body = data[at + _RECORD.size : at + _RECORD.size + length]
            at += _RECORD.size + length
            if kind == b"w":
                for start in range(0, length, BLOCK):
                    yield Write(offset + start, body[start : start + BLOCK])
            else:
                yield Flush() if kind == b"f" else Mark(body.decode())


@contextmanager
def served(image: bytes, place: Path) -> Iterator[Disk]:
    """Serve a disk with this content in the directory `place`. For a mount namespace of our own.

    A child process serves the disk: it ends with its parent, and its mount with both.
    """
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0"
    mount("quickthaw-test", str(place), "fuse", 0, options)
    log = os.memfd_create("log")
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours, theirs = (end.detach() for end in ends)
    parent = os.getpid()
    server = os.fork()
    if server == 0:
        die_with_parent(parent)
        os.close(ours)
        _Server(fuse, theirs, log, bytearray(image)).serve()
    for fd in (fuse, theirs):
        os.close(fd)  # so that waiters end when the server ends
    try:
        yield Disk(place / NAME, log, ours)
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
        os.close(ours)
        os.close(log)


class _Server:
    """Answers the kernel, a request at a time, so that all events have a single order."""

    def __init__(self, fuse: int, marks: int, log: int, content: bytearray) -> None:
        self._fuse, self._marks, self._log, self._content = fuse, marks, log, content
        self._answers: dict[int, Callable[[int, bytes], bytes | int]] = {
            _INIT: self._init, _LOOKUP: self._lookup, _GETATTR: self._getattr,
            _SETATTR: self._getattr, _OPEN: self._open, _READ: self._read, _WRITE: self._write,
            _FSYNC: self._fsync, _FLUSH: self._done, _RELEASE: self._done,
        }  # fmt: skip

    def serve(self) -> None:
        """Serve until killed or unmounted."""
        try:
            while True:
                ready, _, _ = select.select([self._fuse, self._marks], [], [])
                if self._marks in ready and not self._mark():
                    break
                if self._fuse in ready:
                    self._request(os.read(self._fuse, _MAX_WRITE + BLOCK))
        finally:
            os._exit(0)

    def _mark(self) -> bool:
        text = os.read(self._marks, BLOCK)
        if text:
            self._record(b"m", 0, text)
            os.write(self._marks, b"!")
        return bool(text)

    def _record(self, kind: bytes, offset: int, body: bytes = b"") -> None:
        os.write(self._log, _RECORD.pack(kind, offset, len(body)) + body)

    def _request(self, data: bytes) -> None:
        _, code, unique, node, *_ = _IN.unpack_from(data)
        if code in (_FORGET, _BATCH_FORGET):
            return  # these two want no answer
        answer = self._answers.get(code, self._unknown)(node, data[_IN.size :])
        error, body = (answer, b"") if isinstance(answer, int) else (0, answer)
        os.write(self._fuse, _OUT.pack(_OUT.size + len(body), -error, unique) + body)

    def _unknown(self, _node: int, _body: bytes) -> int:
        return errno.ENOSYS

    def _done(self, _node: int, _body: bytes) -> bytes:
        return b""

    def _init(self, _node: int, _body: bytes) -> bytes:
        big_writes, max_pages = 1 << 5, 1 << 22
        return struct.pack(
            "=IIIIHHIIHH32x", 7, 31, 0, big_writes | max_pages, 1, 1, _MAX_WRITE, 1,
            _MAX_WRITE // BLOCK, 0,
        )  # fmt: skip

    def _attributes(self, node: int) -> bytes:
        kind = stat.S_IFDIR | 0o700 if node == _ROOT else stat.S_IFREG | 0o600
        size = 0 if node == _ROOT else len(self._content)
        return struct.pack("=QQQ24x12xIIIIIII", node, size, size // 512, kind, 1, 0, 0, 0, BLOCK, 0)

    def _lookup(self, _node: int, body: bytes) -> bytes | int:
        if body != NAME.encode() + b"\0":
            return errno.ENOENT
        return struct.pack("=QQQQII", _FILE, 0, 3600, 3600, 0, 0) + self._attributes(_FILE)

    def _getattr(self, node: int, _body: bytes) -> bytes:
        return struct.pack("=QII", 3600, 0, 0) + self._attributes(node)

    def _open(self, _node: int, _body: bytes) -> bytes:
        return struct.pack("=QII", 0, _FOPEN_DIRECT_IO, 0)

    def _read(self, _node: int, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("=QQI", body)
        return bytes(self._content[offset : offset + size])

    def _write(self, _node: int, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("=QQI", body)
        written = body[40 : 40 + size]
        self._content[offset : offset + size] = written
        self._record(b"w", offset, written)
        return struct.pack("=II", size, 0)

    def _fsync(self, _node: int, _body: bytes) -> bytes:
        self._record(b"f", 0)
        return b""
