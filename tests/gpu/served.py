"""An area of another process filled through userfaultfd while that process already reads it."""

import bisect
import ctypes
import errno
import fcntl
import os
import select
import struct
import threading
import time
from typing import Final

from tests.gpu import injected
from tests.gpu.procfs import Area
from tests.gpu.staging import Copy

BLOCK: Final = 4 << 20
_SYS_CLOSE, _SYS_USERFAULTFD, _SYS_PIDFD_GETFD = 3, 323, 438
_API, _REGISTER, _COPY = 0xC018AA3F, 0xC020AA00, 0xC028AA03
_MISSING: Final = 1
_PAGEFAULT: Final = 0x12
_MESSAGE: Final = struct.Struct("=B7xQQQ")
_libc = ctypes.CDLL(None, use_errno=True)


def userfaultfd_of(pid: int) -> int:
    """A userfaultfd of the memory of `pid`, made by it and passed to us. Raises OSError."""
    theirs = injected.call(pid, _SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    pidfd = os.pidfd_open(pid)
    try:
        ours = _libc.syscall(_SYS_PIDFD_GETFD, pidfd, theirs, 0)
        if ours < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"pidfd_getfd: {os.strerror(code)}")
    finally:
        os.close(pidfd)
        injected.call(pid, _SYS_CLOSE, theirs)
    fcntl.ioctl(ours, _API, struct.pack("=QQQ", 0xAA, 0, 0))
    return int(ours)


class Served:
    """Fills `held` from `copy`: in order on `threads`, and at once where the process waits."""

    def __init__(self, pid: int, held: list[Area], copy: Copy, threads: int) -> None:
        self._fd = userfaultfd_of(pid)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(copy.room))
        self._blocks: dict[int, tuple[int, int]] = {}
        offset = 0
        for area in held:
            fcntl.ioctl(
                self._fd, _REGISTER, struct.pack("=QQQQ", area.start, area.size, _MISSING, 0)
            )
            for at in range(area.start, area.end, BLOCK):
                self._blocks[at] = (min(BLOCK, area.end - at), offset)
                offset += min(BLOCK, area.end - at)
        self._starts = sorted(self._blocks)
        self._left, self._lock = dict.fromkeys(self._starts), threading.Lock()
        self.waited = 0
        self.took_s = 0.0
        self._started = time.monotonic()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._fill) for _ in range(threads)]
        self._threads.append(threading.Thread(target=self._answer))
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """When everything is filled, or the process is gone."""
        for thread in self._threads[:-1]:
            thread.join()
        self._over.set()
        self._threads[-1].join()
        os.close(self._fd)

    def _claim(self, start: int | None) -> int | None:
        with self._lock:
            if start is None:
                start = next(iter(self._left), None)
            if start is None or start not in self._left:
                return None
            del self._left[start]
            return start

    def _fill(self) -> None:
        while (start := self._claim(None)) is not None:
            self._copy(start)
        self.took_s = max(self.took_s, time.monotonic() - self._started)

    def _copy(self, start: int) -> None:
        size, offset = self._blocks[start]
        done = 0
        while done < size:
            words = (start + done, self._address + offset + done, size - done, 0, 0)
            argument = ctypes.create_string_buffer(struct.pack("=QQQQq", *words))
            if _libc.ioctl(self._fd, ctypes.c_ulong(_COPY), argument) == 0:
                return
            code = ctypes.get_errno()
            copied = struct.unpack("=q", argument.raw[32:40])[0]
            done += max(copied, 0)
            if code == errno.EEXIST:
                done += 4096
            elif code != errno.EAGAIN:
                return  # the process has unmapped the area, or is gone

    def _answer(self) -> None:
        while not self._over.is_set():
            if not select.select([self._fd], [], [], 0.05)[0]:
                continue
            try:
                event, _, address, _ = _MESSAGE.unpack(os.read(self._fd, _MESSAGE.size))
            except BlockingIOError:
                continue
            if event == _PAGEFAULT:
                self.waited += 1
                start = self._starts[bisect.bisect_right(self._starts, address) - 1]
                if self._claim(start) is not None:
                    self._copy(start)
