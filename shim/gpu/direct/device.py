"""The CUDA driver as the host's saver and loader uses it: memory of a GPU, and copies. Lean.

ctypes releases the interpreter's lock in every call, so threads copy side by side. Waiting does
not spin: CRIU needs the processors.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from ctypes import byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint64, c_void_p

from shim.gpu.calls import LIBRARIES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

GRAIN_BYTES = 2 << 20
_BLOCKING_SYNC = 4
_NON_BLOCKING = 1
_POSIX_FD = 1
_DEVICE = 1
_PINNED = 1
_READWRITE = 3
_ALREADY = 712  # CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED
_MMAP_FLAGS = 0x22  # MAP_PRIVATE | MAP_ANONYMOUS
_RDMA = 110


class Location(ctypes.Structure):
    """CUmemLocation."""


Location._fields_ = [("type", c_int), ("id", c_int)]


class Properties(ctypes.Structure):
    """CUmemAllocationProp."""


Properties._fields_ = [
    ("type", c_int),
    ("handle_types", c_int),
    ("location", Location),
    ("win32", c_void_p),
    ("compression", c_ubyte),
    ("rdma", c_ubyte),
    ("usage", ctypes.c_ushort),
    ("reserved", c_ubyte * 4),
]


class AccessDesc(ctypes.Structure):
    """CUmemAccessDesc."""


AccessDesc._fields_ = [("location", Location), ("flags", c_int)]


class DriverError(Exception):
    """A call of the driver failed. code: its CUresult."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call}: {name} ({code})")
        self.code = code


class Driver:
    """libcuda, initialised."""

    def __init__(self) -> None:
        """Raises OSError where there is no libcuda, DriverError."""
        self._lib = _load()
        self.do("cuInit", 0)

    def do(self, call: str, *arguments: object) -> None:
        """Raises DriverError."""
        code = getattr(self._lib, call)(*arguments)
        if code:
            name = c_char_p()
            self._lib.cuGetErrorName(code, byref(name))
            raise DriverError(call, code, (name.value or b"?").decode())

    def ordinal(self, uuid: bytes) -> int:
        """The device with a UUID. Raises LookupError."""
        count = c_int()
        self.do("cuDeviceGetCount", byref(count))
        for number in range(count.value):
            found = (c_ubyte * 16)()
            self.do("cuDeviceGetUuid_v2", found, number)
            if bytes(found) == uuid:
                return number
        raise LookupError(f"no GPU {uuid.hex()} among {count.value}")

    def attribute(self, which: int, ordinal: int) -> int:
        """cuDeviceGetAttribute."""
        value = c_int()
        self.do("cuDeviceGetAttribute", byref(value), which, ordinal)
        return value.value


def _load() -> ctypes.CDLL:
    for name in LIBRARIES[:-1]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return ctypes.CDLL(LIBRARIES[-1])


class DeviceMemory:
    """A piece of device memory that is mapped here. at: its address. Close it to let it go."""

    __slots__ = ("_gpu", "_handle", "at", "octets")

    def __init__(self, gpu: Gpu, handle: c_uint64, octets: int) -> None:
        self._gpu, self._handle, self.octets = gpu, handle, octets
        self.at = gpu.mapped(handle, octets)

    def export(self) -> int:
        """A descriptor for another process, the caller's to close."""
        fd = c_int(-1)
        self._gpu.driver.do(
            "cuMemExportToShareableHandle", byref(fd), self._handle, _POSIX_FD, c_uint64(0)
        )
        return fd.value

    def close(self) -> None:
        """Unmap and release. Idempotent."""
        if self.at:
            at, self.at = self.at, 0
            self._gpu.unmapped(at, self.octets)
            self._gpu.driver.do("cuMemRelease", self._handle)


class Gpu:
    """A context on one GPU, by its UUID, in this process."""

    def __init__(self, driver: Driver, uuid: bytes) -> None:
        """Raises LookupError, DriverError."""
        self.driver, self.uuid = driver, uuid
        self.ordinal = driver.ordinal(uuid)
        self._context = c_void_p()
        self._areas: list[mmap.mmap] = []
        driver.do("cuCtxCreate_v2", byref(self._context), _BLOCKING_SYNC, self.ordinal)
        self._rdma = driver.attribute(_RDMA, self.ordinal)

    def use(self) -> None:
        """Make it the calling thread's."""
        self.driver.do("cuCtxSetCurrent", self._context)

    def imported(self, fd: int, octets: int) -> DeviceMemory:
        """A piece of another process; `fd` stays the caller's."""
        handle = c_uint64()
        self.driver.do("cuMemImportFromShareableHandle", byref(handle), c_void_p(fd), _POSIX_FD)
        return self._owned(handle, octets)

    def created(self, octets: int) -> DeviceMemory:
        """A new piece that can be exported."""
        handle = c_uint64()
        wanted = Properties(
            _PINNED, _POSIX_FD, Location(_DEVICE, self.ordinal), None, 0, bool(self._rdma)
        )
        self.driver.do("cuMemCreate", byref(handle), c_size_t(octets), byref(wanted), c_uint64(0))
        return self._owned(handle, octets)

    def _owned(self, handle: c_uint64, octets: int) -> DeviceMemory:
        try:
            return DeviceMemory(self, handle, octets)
        except DriverError:
            self.driver.do("cuMemRelease", handle)
            raise

    def mapped(self, handle: c_uint64, octets: int) -> int:
        """The address at which a handle can be used from now on."""
        at, do = c_uint64(), self.driver.do
        size, zero = c_size_t(octets), c_uint64(0)
        do("cuMemAddressReserve", byref(at), size, c_size_t(GRAIN_BYTES), zero, zero)
        do("cuMemMap", at, size, c_size_t(0), handle, zero)
        access = AccessDesc(Location(_DEVICE, self.ordinal), _READWRITE)
        do("cuMemSetAccess", at, size, byref(access), c_size_t(1))
        return at.value

    def unmapped(self, at: int, octets: int) -> None:
        """The reverse of `mapped`."""
        self.driver.do("cuMemUnmap", c_uint64(at), c_size_t(octets))
        self.driver.do("cuMemAddressFree", c_uint64(at), c_size_t(octets))

    def pinned(self, octets: int) -> int:
        """The address of host memory that the device copies from and to at full speed.

        Of huge pages, which the driver's own would not be. It stays until the process ends.
        """
        whole = octets + GRAIN_BYTES
        area = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._areas.append(area)
        at = ctypes.addressof(ctypes.c_char.from_buffer(area))
        start = -at % GRAIN_BYTES
        area.madvise(mmap.MADV_HUGEPAGE, start, octets)
        self.driver.do("cuMemHostRegister_v2", c_void_p(at + start), c_size_t(octets), 0)
        return at + start

    def free_bytes(self) -> int:
        """Device memory that nobody uses. The context is the current one."""
        free, total = c_size_t(), c_size_t()
        self.driver.do("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value

    def stream(self) -> c_void_p:
        """A new stream of the current context."""
        made = c_void_p()
        self.driver.do("cuStreamCreate", byref(made), _NON_BLOCKING)
        return made

    def to_device(self, at: int, host: int, octets: int, stream: c_void_p) -> None:
        """Begin a copy."""
        self.driver.do(
            "cuMemcpyHtoDAsync_v2", c_uint64(at), c_void_p(host), c_size_t(octets), stream
        )

    def to_host(self, host: int, at: int, octets: int, stream: c_void_p) -> None:
        """Begin a copy."""
        self.driver.do(
            "cuMemcpyDtoHAsync_v2", c_void_p(host), c_uint64(at), c_size_t(octets), stream
        )

    def wait(self, stream: c_void_p) -> None:
        """Until all that was begun on it is done."""
        self.driver.do("cuStreamSynchronize", stream)

    def close(self) -> None:
        """The context, and what is left in it."""
        if self._context.value:
            context, self._context = self._context, c_void_p()
            self.driver.do("cuCtxDestroy_v2", context)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def processors(share: float = 0.75, most: int = 12) -> int:
    """How many threads copy: CRIU wants processors, too. More than 12 gain nothing."""
    return max(1, min(most, int(len(os.sched_getaffinity(0)) * share)))
