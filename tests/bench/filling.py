"""Program: measures the limits of this machine. Standard library only.

    python3 -IS filling.py fill FILE BYTES THREADS     fresh memory filled with UFFDIO_COPY
    python3 -IS filling.py read FILE THREADS           FILE read past the page cache
    python3 -IS filling.py touch BYTES HUGE_BYTES      memory allocated, written to, given back

Prints bytes per second. As the source of a fill, FILE is mapped, and read before the timed part.
The kernel copies: Python's lock is not held meanwhile. Source: userfaultfd(2),
ioctl_userfaultfd(2).
"""

import ctypes
import mmap
import os
import platform
import sys
import threading
import time
from collections.abc import Callable

SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
UFFD_API = 0xAA
UFFDIO_API, UFFDIO_REGISTER, UFFDIO_COPY = 0xC018AA3F, 0xC020AA00, 0xC028AA03
REGISTER_MODE_MISSING = 1
MADV_HUGEPAGE, MADV_POPULATE_READ = 14, 22
CHUNK = 4 << 20
libc = ctypes.CDLL(None, use_errno=True)
Words5 = ctypes.c_uint64 * 5


def ioctl(fd: int, request: int, *words: int) -> None:
    """Call an ioctl with a structure of 64-bit words. Raises OSError."""
    argument = Words5(*words)
    if libc.ioctl(ctypes.c_int(fd), ctypes.c_ulong(request), ctypes.byref(argument)) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), f"ioctl {request:#x}")


def address_of(area: mmap.mmap) -> int:
    """Returns the address of a mapping. A read-only mapping has no buffer that ctypes takes."""
    return ctypes.addressof(ctypes.c_char.from_buffer(area))


def in_threads(count: int, length: int, work: Callable[[int, int], None]) -> float:
    """Returns the seconds of `work(offset, size)` over all chunks of `length`, in threads."""
    offsets = iter(range(0, length, CHUNK))
    lock = threading.Lock()

    def run() -> None:
        while True:
            with lock:
                offset = next(offsets, None)
            if offset is None:
                return
            work(offset, min(CHUNK, length - offset))

    threads = [threading.Thread(target=run) for _ in range(count)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


def fill(path: str, length: int, count: int) -> float:
    """Returns bytes per second of a fill of fresh private memory."""
    with open(path, "rb") as file:
        source = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE)  # writable: it has a buffer
    size = len(source)
    source.madvise(MADV_POPULATE_READ)
    memory = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    to, of = address_of(memory), address_of(source)
    fault_fd = libc.syscall(SYS_USERFAULTFD[platform.machine()], os.O_CLOEXEC)
    if fault_fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "userfaultfd")
    ioctl(fault_fd, UFFDIO_API, UFFD_API)
    ioctl(fault_fd, UFFDIO_REGISTER, to, length, REGISTER_MODE_MISSING)

    def copy(offset: int, chunk: int) -> None:
        ioctl(fault_fd, UFFDIO_COPY, to + offset, of + offset % (size - CHUNK + 1), chunk, 0)

    return length / in_threads(count, length, copy)


def read(path: str, count: int) -> float:
    """Returns bytes per second of a read with O_DIRECT."""
    size = os.stat(path).st_size // CHUNK * CHUNK
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    buffers = threading.local()

    def chunk(offset: int, length: int) -> None:
        if not hasattr(buffers, "area"):
            buffers.area = mmap.mmap(-1, CHUNK)
        os.preadv(fd, [memoryview(buffers.area)[:length]], offset)

    return size / in_threads(count, size, chunk)


def touch(small: int, huge: int) -> float:
    """Returns bytes per second of a first touch, by pages and by huge pages.

    The kernel takes these from different blocks: memory that was touched as pages does not help a
    process that needs huge pages, nor the reverse.
    """
    pages = mmap.mmap(-1, small, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    areas = [(0, address_of(pages))]
    if huge:
        huge_pages = mmap.mmap(-1, huge, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        huge_pages.madvise(MADV_HUGEPAGE)
        areas.append((small, address_of(huge_pages)))

    def write(offset: int, chunk: int) -> None:
        begins, area = areas[huge > 0 and offset >= small]
        ctypes.memset(area + offset - begins, 1, chunk)

    return (small + huge) / in_threads(os.cpu_count() or 1, small + huge, write)


def main() -> None:
    """Measure as the arguments say. Raises OSError."""
    what, *given = sys.argv[1:]
    if what == "fill":
        print(fill(given[0], int(given[1]), int(given[2])))
    elif what == "read":
        print(read(given[0], int(given[1])))
    else:
        print(touch(int(given[0]), int(given[1])))


if __name__ == "__main__":
    main()
