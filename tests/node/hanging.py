"""A volume whose server stops to answer: a FUSE server of a few lines, in a test node.

Runs as a script in the node, with the standard library alone. Source: the kernel, fuse.h.
"""

import contextlib
import ctypes
import os
import select
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tests.node.node import Node

FILE: Final = b"file"
SIZE: Final = 4096
_ROOT, _INO = 1, 2
_NOSUID_NODEV = 2 | 4
_LOOKUP, _FORGET, _GETATTR, _SETATTR, _OPEN, _READ, _WRITE, _STATFS = 1, 2, 3, 4, 14, 15, 16, 17
_RELEASE, _FLUSH, _INIT, _OPENDIR, _READDIR, _RELEASEDIR = 18, 25, 26, 27, 28, 29
_ACCESS, _INTERRUPT, _DESTROY, _BATCH_FORGET = 34, 36, 38, 42
_ENOENT, _ENOSYS = 2, 38
_LOOK_S = 0.1
_HEADER = struct.Struct("=IIQQIIII")
_UNANSWERED = (_FORGET, _BATCH_FORGET, _INTERRUPT)
_NOTHING = (_RELEASE, _FLUSH, _RELEASEDIR, _ACCESS, _DESTROY)
"""Requests whose answer has no content."""


@contextlib.contextmanager
def volume(node: "Node", place: str, hangs: str) -> Iterator[None]:
    """Mount the volume at `place` of the node, inside of the `with`. It has a file FILE.

    hangs: a file; while it exists, requests of processes that it names get no answer.
    """
    server = node.popen(["python3", "-ISE", "-c", Path(__file__).read_text(), place, hangs])
    try:
        node.run(["sh", "-c", f"for i in $(seq 100); do [ -e {place}/file ] && exit; sleep 0.05; "
                              "done; exit 1"])  # fmt: skip
        yield
    finally:
        node.path(hangs).unlink(missing_ok=True)
        server.kill()  # the kernel then gives every waiting process an error
        server.wait()
        node.call(["umount", "-l", place])


def _attributes(node_id: int) -> bytes:
    mode, size = (0o40777, 0) if node_id == _ROOT else (0o100666, SIZE)
    times = struct.pack("=6Q3I", node_id, size, 8, 0, 0, 0, 0, 0, 0)
    return times + struct.pack("=7I", mode, 1, 0, 0, 0, 4096, 0)


def _answer(code: int, node_id: int, body: bytes) -> bytes | int:
    """Returns the content of an answer, or a negative errno."""
    if code == _INIT:
        return struct.pack("=IIIIHHIIHHI7I", 7, 31, 65536, 0, 16, 16, 65536, 1, 1, 0, 0, *[0] * 7)
    if code == _LOOKUP:
        if body.rstrip(b"\0") != FILE:
            return -_ENOENT
        return struct.pack("=4QII", _INO, 0, 0, 0, 0, 0) + _attributes(_INO)
    if code in (_GETATTR, _SETATTR):
        return struct.pack("=QII", 0, 0, 0) + _attributes(node_id)
    if code in (_OPEN, _OPENDIR):
        return struct.pack("=QII", 1, 0, 0)
    if code == _READ:
        at, length = struct.unpack_from("=QI", body, 8)
        return bytes(max(0, min(length, SIZE - at)))
    if code == _WRITE:
        return struct.pack("=II", struct.unpack_from("=I", body, 16)[0], 0)
    if code == _STATFS:
        return struct.pack("=5Q4I6I", 1000, 1000, 1000, 1000, 1000, 4096, 255, 4096, 0, *[0] * 6)
    return b"" if code in (*_NOTHING, _READDIR) else -_ENOSYS


def _hangs(pid: int, hangs: str) -> bool:
    with contextlib.suppress(OSError):
        named = Path(hangs).read_text().split()
        return Path(f"/proc/{pid}/comm").read_text().strip() in named
    return False


def _serve(place: str, hangs: str) -> None:
    fd = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"test", place.encode(), b"fuse", _NOSUID_NODEV, options):
        raise OSError(ctypes.get_errno(), "mount")
    kept: list[tuple[int, bytes]] = []
    while True:
        if not select.select([fd], [], [], _LOOK_S)[0]:
            for pid, answer in kept:
                if not _hangs(pid, hangs):
                    _write(fd, answer)
            kept = [each for each in kept if _hangs(each[0], hangs)]
            continue
        request = os.read(fd, 1 << 17)
        _, code, unique, node_id, _, _, pid, _ = _HEADER.unpack_from(request)
        if code in _UNANSWERED:
            continue
        found = _answer(code, node_id, request[_HEADER.size :])
        content, error = (b"", found) if isinstance(found, int) else (found, 0)
        answer = struct.pack("=IiQ", 16 + len(content), error, unique) + content
        if _hangs(pid, hangs):
            kept.append((pid, answer))
        else:
            _write(fd, answer)


def _write(fd: int, answer: bytes) -> None:
    with contextlib.suppress(OSError):  # the process has ended meanwhile
        os.write(fd, answer)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
