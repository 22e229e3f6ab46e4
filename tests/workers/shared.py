"""A process and a child with shared memory of every kind, whose every byte can be verified.

    MEMFD_MIB=64 ANON_MIB=64 SYSV_MIB=64 SHM_MIB=16 GONE_MIB=8 FILE_MIB=8 python3 -m workers.shared

memfd: a memfd, mapped and open; and a sealed memfd of a quarter of the size and an odd length,
which is only open. anon: MAP_SHARED | MAP_ANONYMOUS. sysv: a segment. shm: a file in /dev/shm.
gone: another file there, which is mapped and has no name any more. file: a file in /srv. 0 leaves a
kind out. Every fourth MiB was never written, every fifth was written with zeros.

    /health      200 when all is written
    /first       {"ok", "nonce"}
    /check       compares every byte, in the child too: {"ok", "items": {kind: [bad MiB, …]}}
    /meet        the child writes into all kinds, and the parent looks for it: {"ok", "items"}
    /state       nonce, pid and so on; and resident bytes by kind
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import random
import secrets
import socket
import struct
import threading
from typing import TYPE_CHECKING, Final

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

if TYPE_CHECKING:
    from collections.abc import Callable

MIB: Final = 1 << 20
_STAMP: Final = struct.Struct("=QQ")
_ROTATION: Final = 4
_SEALS: Final = 0xF  # seal, shrink, grow, write
_CHECK, _MEET = b"c", b"m"


class Kind:
    """An object: its mapping here, and its expected content."""

    def __init__(self, name: str, view: memoryview, seed: int) -> None:
        self.name, self.view = name, view
        source = random.Random(seed)  # noqa: S311  content to recognise, not a secret
        self._blocks = [source.randbytes(MIB) for _ in range(_ROTATION)]

    def _expected(self, index: int) -> bytes:
        size = min(MIB, len(self.view) - index * MIB)
        if index % 4 == 3 or index % 5 == 4:
            return bytes(size)
        block = bytearray(self._blocks[index % _ROTATION][:size])
        for page in range(0, size - _STAMP.size, mmap.PAGESIZE):
            _STAMP.pack_into(block, page, index, page)
        return bytes(block)

    def fill(self) -> None:
        """Write the expected content."""
        for index in range(-(-len(self.view) // MIB)):
            if index % 4 != 3:
                expected = self._expected(index)
                self.view[index * MIB :][: len(expected)] = expected

    def bad(self) -> list[int]:
        """Returns the numbers of wrong blocks, without the last word of the object."""
        found = []
        for index in range(-(-len(self.view) // MIB)):
            expected = self._expected(index)
            there = bytes(self.view[index * MIB :][: len(expected)])
            if index == (len(self.view) - 1) // MIB:
                there, expected = there[:-8], expected[:-8]
            if there != expected:
                found.append(index)
        return found


def _memfd(size: int) -> memoryview:
    fd = os.memfd_create("shared-worker")
    os.ftruncate(fd, size)
    return memoryview(mmap.mmap(fd, size))  # the descriptor stays open, too


def _segment(size: int) -> memoryview:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.shmget.argtypes = (ctypes.c_int, ctypes.c_size_t, ctypes.c_int)
    libc.shmat.restype = ctypes.c_void_p
    number = libc.shmget(0, size, 0o1600)
    address = libc.shmat(number, None, 0)
    if number < 0 or address is None or address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "shmat")
    libc.shmctl(number, 0, None)  # IPC_RMID: the segment goes with its last user
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def _file(path: str, size: int, *, gone: bool = False) -> memoryview:
    with open(path, "w+b") as file:
        os.ftruncate(file.fileno(), size)
        mapped = memoryview(mmap.mmap(file.fileno(), size))
    if gone:
        os.unlink(path)
    return mapped


class Sealed:
    """A memfd that is only open, and sealed against changes."""

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("sealed-worker", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)
        with mmap.mmap(self.fd, size) as mapped, memoryview(mapped) as view:
            Kind("sealed", view, 7).fill()
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)

    def bad(self) -> list[int]:
        """Returns wrong blocks as Kind does, and -1 when the seals are gone."""
        size = os.fstat(self.fd).st_size
        with mmap.mmap(self.fd, size, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as view:
            found = Kind("sealed", view, 7).bad()
        return found if fcntl.fcntl(self.fd, fcntl.F_GET_SEALS) == _SEALS else [*found, -1]


class Worker:
    """All kinds, a child, and the endpoints."""

    def __init__(self) -> None:
        self.me, self.log, self.full = Identity("shared"), LineLog(), False
        sizes = {
            name: int(os.environ.get(f"{name.upper()}_MIB", "0")) * MIB
            for name in ("memfd", "anon", "sysv", "shm", "gone", "file")
        }
        makers: dict[str, Callable[[int], memoryview]] = {
            "memfd": _memfd,
            "anon": lambda size: memoryview(mmap.mmap(-1, size)),
            "sysv": _segment,
            "shm": lambda size: _file("/dev/shm/shared-worker", size),
            "gone": lambda size: _file("/dev/shm/shared-worker-gone", size, gone=True),
            "file": lambda size: _file("/srv/shared-worker", size),
        }
        self.kinds = [
            Kind(name, makers[name](size), number)
            for number, (name, size) in enumerate(sizes.items())
            if size
        ]
        self.sealed = Sealed(sizes["memfd"] // 4 - 1000) if sizes["memfd"] else None
        self.ours, its = socket.socketpair()
        if not os.fork():
            self.ours.close()
            self._obey(its)
        its.close()
        self._lock = threading.Lock()

    def _obey(self, its: socket.socket) -> None:
        """Obey the parent. Runs in the child."""
        try:
            while asked := its.recv(9):
                if asked[:1] == _CHECK:
                    bad = any(kind.bad() for kind in self.kinds)
                    its.send(b"bad" if bad else b"ok")
                else:
                    for kind in self.kinds:
                        kind.view[-8:] = asked[1:]
                    its.send(b"ok")
        finally:
            os._exit(0)

    def _child(self, asked: bytes) -> bytes:
        self.ours.send(asked)
        return self.ours.recv(16)

    def check(self, _: Ask) -> Json:
        """Check everything, here and in the child."""
        with self._lock:
            items = {kind.name: kind.bad() for kind in self.kinds}
            if self.sealed:
                items["sealed"] = self.sealed.bad()
            child = self._child(_CHECK)
        return {"ok": not any(items.values()) and child == b"ok", "items": items,
                "child": child.decode()}  # fmt: skip

    def meet(self, _: Ask) -> Json:
        """Check that parent and child still share their memory."""
        word = secrets.token_bytes(8)
        with self._lock:
            self._child(_MEET + word)
            items = {kind.name: bytes(kind.view[-8:]) == word for kind in self.kinds}
        return {"ok": all(items.values()), "items": items}

    def health(self, _: Ask) -> object:
        """Answer 200 when all is written."""
        return {"ok": True} if self.full else Reply(503, {"ok": False})

    def first(self, _: Ask) -> Json:
        """Returns the nonce."""
        return {"ok": self.full, "nonce": self.me.nonce}

    def state(self, _: Ask) -> Json:
        """Returns the proof of identity, and the resident memory."""
        with open("/proc/self/status", encoding="ascii") as file:
            resident = [line.split()[1] for line in file if line.startswith("RssShmem")]
        return {**self.me.describe(), "restored": restored(), "rss_shmem_kib": int(resident[0])}

    def run(self) -> None:
        """Serve, fill, and stay."""
        routes = {
            "/health": self.health,
            "/first": self.first,
            "/check": self.check,
            "/meet": self.meet,
            "/state": self.state,
        }
        Server("0.0.0.0", port_from_environment(), routes, self.log, self.me).start()  # noqa: S104
        stop_on_sigterm(self.log)
        for kind in self.kinds:
            kind.fill()
        self.full = True
        self.log.say("ready " + " ".join(f"{each.name}={len(each.view)}" for each in self.kinds))
        threading.Event().wait()


if __name__ == "__main__":
    Worker().run()
