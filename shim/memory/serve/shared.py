"""Fills the shared memory of a restored container from outside, while CRIU waits. Lean.

CRIU restores memfds, shared anonymous memory and System V segments one by one: it makes the object
at its full size, maps it, opens the image that lists its pages, and reads the list. In our view of
the images that file is a fifo. So by opening the fifo, CRIU tells us that the object is there and
empty, and then waits in `read` until we have written the list of the pages that follow: none.
Before we write, we fill the object on all processors. No process of the container runs yet, no seal
is set, and no process can ever see the object half filled.

A process of its own, the filler, does this: it joins the container's cgroup, because the kernel
charges a page to the process that touches it first. The filler ends when CRIU has asked for all
objects. When the filler is killed, CRIU reads the end of the fifo instead of an image, and fails.
When a process of CRIU ends while the filler works for it, CRIU fails, too, and knows why: then the
filler ends without a complaint.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from functools import partial

from shim.contract import faults
from shim.integrity.chunks import CHUNK_BYTES
from shim.kernel import cgroup, priority, process, procfs
from shim.kernel.hugepages import HUGE_BYTES
from shim.kernel.libc import mapped_shared
from shim.memory.serve import child, messages
from shim.memory.serve.fifos import NotFilled
from shim.memory.serve.payload import Damaged
from shim.memory.serve.sharedfill import Threads, fill

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping, Sequence

    from shim.memory.layout import SharedLayout
    from shim.memory.serve.fifos import Asked
    from shim.memory.serve.payload import Payload

    Job = Callable[[], None]

_ENDS_WITHIN_S = 1.0
"""A process that ends has no memory left for a moment before it has ended."""
_NAMES = (b"/memfd:", b"/dev/zero", b"/SYSV")


class Filler:
    """The page server's view of the filler."""

    def __init__(self, pid: int, its: socket.socket) -> None:
        self._pid, self._its = pid, its
        self.is_done = False

    def fileno(self) -> int:
        """Returns a descriptor, readable when the filler is done or failed; -1 after its end."""
        return self._its.fileno()

    def hear(self) -> None:
        """Take up the filler's message, if there is one. Raises Damaged, NotFilled."""
        try:
            told = self._its.recv(messages.MOST_BYTES) if self._pid else b""
        except BlockingIOError:
            return
        why = told[1:].decode(errors="replace")
        if told[:1] == messages.DAMAGED:
            raise Damaged(why)
        if told[:1] == messages.ALL_ASKED:
            self.is_done = True
        elif told[:1] == messages.LEFT:
            self.end()
        elif not self.is_done:
            raise NotFilled(why or "the filler of shared memory was killed")
        else:
            self.end()

    def must_be_done(self) -> None:
        """Check that the filler is done: the processes are about to run.

        Raises as `hear` does, and NotFilled when CRIU has not asked for all objects.
        """
        if not self.is_done and self._pid:
            self.hear()
        if not self.is_done:
            raise NotFilled("CRIU has not asked for all of shared memory")

    def end(self) -> None:
        """Return when the filler has ended; a filler that is not done is killed. Idempotent."""
        pid, self._pid = self._pid, 0
        if not pid:
            return
        if not self.is_done:
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self._its.close()


def start(
    container: str, asked: Asked, shared: Sequence[SharedLayout], payloads: Mapping[str, Payload]
) -> Filler:
    """Start the filler, before CRIU. Call it in a process without threads. Closes `asked` there."""
    server = os.getpid()

    def serve(its: socket.socket) -> None:
        priority.killed_with_parent(server)
        _serve(container, asked, shared, payloads, its)

    pid, ours = child.started(serve)
    asked.close()
    ours.setblocking(False)
    return Filler(pid, ours)


def _serve(
    container: str,
    asked: Asked,
    shared: Sequence[SharedLayout],
    payloads: Mapping[str, Payload],
    its: socket.socket,
) -> None:
    """Run the filler."""
    pid = 0
    try:
        priority.be_called("quickthaw-shm")
        threads = Threads()
        left = {each.image: each for each in shared}
        # While CRIU starts. Pages that are read for this are not charged to the container.
        content = [payloads[each.data] for each in shared]
        threading.Thread(target=_prepare, args=(content,), daemon=True).start()
        charged = 0
        while left:
            for image in asked.wait():
                found = left.pop(image)
                faults.point("memory.shared", container)
                pid = asked.asking(image)
                if pid != charged:
                    with contextlib.suppress(ValueError):  # no cgroup counts memory here
                        cgroup.charge_to(pid)
                    charged = pid
                answer = partial(_answer, asked, image, None if left else its)
                _fill(pid, found, payloads[found.data], threads, answer)
    except Damaged as error:
        its.send(messages.DAMAGED + str(error).encode()[: messages.MOST_BYTES - 1])
    except Exception as error:  # noqa: BLE001 - the border: the page server ends the container
        if pid and _ends(pid):
            its.send(messages.LEFT)
            return
        why = str(error) or type(error).__name__
        its.send(messages.FAILED + f"shared memory: {why}".encode()[: messages.MOST_BYTES - 1])


def _ends(pid: int) -> bool:
    """Returns whether the process of CRIU that asked has ended, or is just ending."""
    try:
        return process.ends(pid, time.monotonic() + _ENDS_WITHIN_S)
    except OSError:
        return True


def _prepare(content: Sequence[Payload]) -> None:
    with contextlib.suppress(Damaged):  # the same error comes again where the content is needed
        for payload in content:
            for offset in range(0, payload.size, CHUNK_BYTES):
                payload.prepare(offset, CHUNK_BYTES)


def _answer(asked: Asked, image: str, told: socket.socket | None) -> None:
    """Let CRIU go on; before the last answer, report that all is done."""
    if told:
        told.send(messages.ALL_ASKED)
    asked.answer(image)


def _fill(pid: int, found: SharedLayout, payload: Payload, threads: Threads, answer: Job) -> None:
    """Fill an object, which CRIU has just made in process `pid`, and answer.

    CRIU does not wait until our mapping is taken down.
    """
    fd = _object(pid, found.size)
    try:
        with mapped_shared(fd, found.size, aligned=HUGE_BYTES) as address:
            fill(address, found, payload, threads)
            answer()
    finally:
        os.close(fd)


def _object(pid: int, size: int) -> int:
    """Returns a descriptor of the object that CRIU has mapped in `pid` and not yet filled.

    CRIU maps the whole object while it reads the list of the object's pages, and only then: we look
    for the object that is mapped shared and writable, has this size, and no page. Raises NotFilled,
    OSError.
    """
    found: dict[int, str] = {}
    for area in procfs.areas(pid, b"s "):
        if not area.name.startswith(_NAMES) or area.rights[:4:3] != b"rs":
            continue
        first, last = area.range
        if area.offset or last - first != size:
            continue
        path = f"/proc/{pid}/map_files/{area.map_file}"
        status = os.stat(path)
        if not status.st_blocks:
            found[status.st_ino] = path
    if len(found) != 1:
        raise NotFilled(
            f"{len(found)} objects fit, expected 1: mapped shared and writable in process {pid}, "
            f"{size} bytes, without pages"
        )
    (path,) = found.values()
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)
