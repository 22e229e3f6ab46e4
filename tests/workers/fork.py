"""A parent with children, which share every kind of object that processes can share.

    PORT=8000 python3 -m workers.fork

Three forked children and two multiprocessing children answer on: a pair of pipes, a socket pair, a
named unix socket (stream and datagram), anonymous shared memory, POSIX shared memory and semaphores
in /dev/shm, a queue, a lock, an event, a file lock, an eventfd, and a memfd; another child has
exited and is never waited for.

    /health    200 once every child answered
    /state     nonce, pid, hostname, uptime_s, requests, children, restored
    /check     a round trip over everything: {"ok", "items": {name: "ok" or the error}}
    /kill?child=N&signal=S   signals a forked child (0 to 2), to test its absence
"""

from __future__ import annotations

import fcntl
import mmap
import multiprocessing
import os
import secrets
import select
import signal
import socket
import struct
import tempfile
import threading
import traceback
from contextlib import ExitStack
from multiprocessing import resource_tracker, shared_memory
from typing import TYPE_CHECKING, Final

from .serving import (
    Ask,
    Identity,
    Json,
    LineLog,
    Server,
    port_from_environment,
    restored,
    stop_on_sigterm,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.queues import Queue
    from multiprocessing.synchronize import Event, Lock, Semaphore

_COUNTER: Final = struct.Struct("=Q")
ANSWER_S: Final = 2.0


class Mismatch(Exception):
    """An answer differs from the expected answer."""


def expect(got: object, wanted: object) -> None:
    """Raise Mismatch unless both are equal."""
    if got != wanted:
        raise Mismatch(f"got {got!r}, wanted {wanted!r}")


def read_within(fd: int, size: int) -> bytes:
    """Read from a pipe whose writer may be gone. Raises TimeoutError after ANSWER_S."""
    if not select.select([fd], [], [], ANSWER_S)[0]:
        raise TimeoutError(f"no answer on fd {fd} within {ANSWER_S} s")
    return os.read(fd, size)


class Inherited:
    """The objects that forked children have from their parent by descriptor or mapping alone."""

    def __init__(self, directory: str) -> None:
        self.to_child, self.from_child = os.pipe(), os.pipe()
        self.pair = socket.socketpair()
        self.memory = mmap.mmap(-1, mmap.PAGESIZE)  # MAP_SHARED | MAP_ANONYMOUS
        self.memfd = os.memfd_create("fork-worker")
        os.ftruncate(self.memfd, mmap.PAGESIZE)
        self.memfd_map = mmap.mmap(self.memfd, mmap.PAGESIZE)
        self.eventfd = os.eventfd(0, os.EFD_NONBLOCK)  # read only when poll reports it readable
        self.stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.stream_path = os.path.join(directory, "stream")
        self.stream.bind(self.stream_path)
        self.stream.listen()
        self.datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.datagram_path = os.path.join(directory, "datagram")
        self.datagram.bind(self.datagram_path)
        self.lock_path = os.path.join(directory, "lock")

    def close(self) -> None:
        """Close this process's ends."""
        for held in (*self.pair, self.stream, self.datagram, self.memory, self.memfd_map):
            held.close()
        for fd in (*self.to_child, *self.from_child, self.memfd, self.eventfd):
            os.close(fd)


def opened(memory: shared_memory.SharedMemory) -> memoryview:
    """Returns the buffer of shared memory. Raises ValueError after it was closed."""
    if memory.buf is None:
        raise ValueError(f"{memory.name} is closed")
    return memory.buf


class Shared:
    """The objects of multiprocessing: names in /dev/shm, and a process that tracks the names."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self.lock: Lock = context.Lock()
        self.semaphore: Semaphore = context.Semaphore(0)
        self.done: Semaphore = context.Semaphore(0)
        self.event: Event = context.Event()
        self.questions: Queue[bytes] = context.Queue()
        self.answers: Queue[bytes] = context.Queue()
        self.posix = shared_memory.SharedMemory(create=True, size=1 << 16)
        self.context = context

    @property
    def counter(self) -> memoryview:
        """Returns the first bytes of the POSIX shared memory, as mapped in this process."""
        return opened(self.posix)[: _COUNTER.size]


def echo_on_pipe(have: Inherited) -> None:
    """Answer each word on the pipe reversed, and count in the shared mappings. Child 0."""
    while data := os.read(have.to_child[0], 4096):
        for mapping in (have.memory, have.memfd_map):
            _COUNTER.pack_into(mapping, 0, _COUNTER.unpack_from(mapping)[0] + 1)
        os.eventfd_write(have.eventfd, 1)
        os.write(have.from_child[1], data[::-1])


def echo_on_sockets(have: Inherited) -> None:
    """Answer on the socket pair and both named sockets, with a single epoll. Child 1."""
    poll = select.epoll()
    for sock in (have.pair[1], have.stream, have.datagram):
        poll.register(sock, select.EPOLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd == have.pair[1].fileno():
                have.pair[1].send(have.pair[1].recv(4096)[::-1])
            elif fd == have.stream.fileno():
                with have.stream.accept()[0] as guest:
                    guest.send(guest.recv(4096)[::-1])
            else:
                data, sender = have.datagram.recvfrom(4096)
                have.datagram.sendto(data[::-1], sender)


def hold_file_lock(have: Inherited) -> None:
    """Hold a POSIX lock on a file for life. Child 2."""
    with open(have.lock_path, "w", encoding="ascii") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        os.write(have.from_child[1], b"locked")
        threading.Event().wait()


def answer_queue(shared: Shared) -> None:
    """Answer questions reversed. First multiprocessing child."""
    while True:
        shared.answers.put(shared.questions.get()[::-1])


def count_on_semaphore(shared: Shared) -> None:
    """Count in POSIX shared memory, under the lock. Second multiprocessing child."""
    while True:
        shared.semaphore.acquire()
        with shared.lock:
            _COUNTER.pack_into(shared.counter, 0, _COUNTER.unpack_from(shared.counter)[0] + 1)
        shared.event.set()
        shared.done.release()


class Family:
    """The parent and its children; a method for each item of /check, which raises on a fault."""

    def __init__(self, directory: str) -> None:
        self.have, self.shared = Inherited(directory), Shared()
        self.started = 0
        self.children = [
            self._fork(body, self.have) for body in (echo_on_pipe, echo_on_sockets, hold_file_lock)
        ]
        expect(read_within(self.have.from_child[0], 6), b"locked")
        self.zombie = self._fork(lambda _: None, self.have)
        self.processes = [
            self.shared.context.Process(target=body, args=(self.shared,), daemon=True)
            for body in (answer_queue, count_on_semaphore)
        ]
        for process in self.processes:
            process.start()

    @staticmethod
    def _fork(body: Callable[[Inherited], None], have: Inherited) -> int:
        if pid := os.fork():
            return pid
        try:
            body(have)
        except BaseException:  # noqa: BLE001  a child must never run the parent's code
            traceback.print_exc()
        os._exit(0)

    def pipes(self) -> None:
        """Send a word down a pipe and back on the other; the child counts it in shared memory."""
        word = secrets.token_bytes(16)
        self.started += 1
        os.write(self.have.to_child[1], word)
        expect(read_within(self.have.from_child[0], 4096), word[::-1])

    def anonymous_shared_memory(self) -> None:
        """Compare the child's count in MAP_SHARED memory; needs `pipes` before."""
        expect(_COUNTER.unpack_from(self.have.memory)[0], self.started)

    def memfd(self) -> None:
        """Compare the child's count in a mapped memfd, read here through the descriptor."""
        expect(_COUNTER.unpack(os.pread(self.have.memfd, 8, 0))[0], self.started)

    def eventfd(self) -> None:
        """Read the child's additions since the last check."""
        expect(os.eventfd_read(self.have.eventfd), 1)

    def socket_pair(self) -> None:
        """Send a word over a connected pair."""
        self._exchange(self.have.pair[0])

    def unix_stream(self) -> None:
        """Make a fresh connection to a named socket."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(ANSWER_S)
            sock.connect(self.have.stream_path)
            self._exchange(sock)

    def unix_datagram(self) -> None:
        """Send a datagram to a named socket, which answers to an abstract socket."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind("")  # Linux picks an abstract name
            sock.connect(self.have.datagram_path)
            self._exchange(sock)

    @staticmethod
    def _exchange(sock: socket.socket) -> None:
        word = secrets.token_bytes(16)
        sock.settimeout(ANSWER_S)
        sock.send(word)
        expect(sock.recv(4096), word[::-1])

    def file_lock(self) -> None:
        """Check that the child's lock keeps others out."""
        with open(self.have.lock_path, "r+", encoding="ascii") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
        raise Mismatch("the child's lock was free")

    def queue(self) -> None:
        """Send a word through two multiprocessing queues, which have threads of their own."""
        word = secrets.token_bytes(16)
        self.shared.questions.put(word)
        expect(self.shared.answers.get(timeout=ANSWER_S), word[::-1])

    def semaphores_and_posix_shared_memory(self) -> None:
        """Use the semaphore to the child, lock, count in /dev/shm, event and semaphore back."""
        before = _COUNTER.unpack_from(self.shared.counter)[0]
        self.shared.event.clear()
        self.shared.semaphore.release()
        expect(self.shared.done.acquire(timeout=ANSWER_S), True)
        expect(self.shared.event.is_set(), True)
        expect(self.shared.lock.acquire(timeout=ANSWER_S), True)
        try:
            expect(_COUNTER.unpack_from(self.shared.counter)[0], before + 1)
        finally:
            self.shared.lock.release()

    def posix_shared_memory_by_name(self) -> None:
        """Check that the name in /dev/shm leads to the same memory."""
        other = shared_memory.SharedMemory(name=self.shared.posix.name)
        try:
            expect(bytes(opened(other)[: _COUNTER.size]), bytes(self.shared.counter))
        finally:
            other.close()

    def parentage(self) -> None:
        """Check that every child is still a child and alive, and that the zombie is a zombie."""
        for pid in [*self.children, *(process.pid or 0 for process in self.processes)]:
            with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
                state, parent = stat.read().rpartition(")")[2].split()[:2]
            expect((state in "SRD", int(parent)), (True, os.getpid()))
        with open(f"/proc/{self.zombie}/stat", encoding="ascii") as stat:
            expect(stat.read().rpartition(")")[2].split()[0], "Z")

    def check(self) -> dict[str, str]:
        """Returns every item by name: `ok`, or the first line of the error."""
        return {item.__name__: outcome(item) for item in self._items()}

    def _items(self) -> list[Callable[[], None]]:
        return [
            self.pipes,
            self.anonymous_shared_memory,
            self.memfd,
            self.eventfd,
            self.socket_pair,
            self.unix_stream,
            self.unix_datagram,
            self.file_lock,
            self.queue,
            self.semaphores_and_posix_shared_memory,
            self.posix_shared_memory_by_name,
            self.parentage,
        ]

    def close(self) -> None:
        """End all children, and remove the shared memory."""
        for pid in [*self.children, self.zombie]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for process in self.processes:
            process.kill()
            process.join()
        self.have.close()
        self.shared.posix.close()
        self.shared.posix.unlink()


def outcome(item: Callable[[], None]) -> str:
    """Run an item. Returns `ok`, or the error in a line."""
    try:
        item()
    except Exception as failed:  # noqa: BLE001  a report of everything that can fail
        return f"{type(failed).__name__}: {failed}"
    return "ok"


def main() -> None:
    """Start the family, then serve until SIGTERM."""
    me, log = Identity("fork"), LineLog()
    with ExitStack() as undo:
        directory = undo.enter_context(tempfile.TemporaryDirectory(prefix="fork-worker-"))
        family = Family(directory)  # before any thread: fork copies only the calling thread
        undo.callback(family.close)
        checking = threading.Lock()

        def check(_: Ask) -> Json:
            with checking:
                items = family.check()
            return {"ok": set(items.values()) == {"ok"}, "items": items}

        def kill(ask: Ask) -> Json:
            pid = family.children[ask.whole("child")]
            os.kill(pid, ask.whole("signal", signal.SIGKILL))
            return {"pid": pid}

        def state(_: Ask) -> Json:
            children = [*family.children, *(process.pid for process in family.processes)]
            return {**me.describe(), "children": children, "restored": restored()}

        routes = {"/health": check, "/check": check, "/state": state, "/kill": kill}
        Server("0.0.0.0", port_from_environment(), routes, log, me).start()  # noqa: S104
        stop_on_sigterm(log)
        log.say(f"ready {len(family.children) + len(family.processes)} children")
        threading.Event().wait()


if __name__ == "__main__":
    resource_tracker.ensure_running()  # a process too: before the first shared name
    main()
