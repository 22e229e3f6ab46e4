"""The probe, with memory on GPUs that can be verified: through libcuda by ctypes.

    MIB=32 DEVICES=0 CHILDREN=0 python3 -m workers.gpu

DEVICES (0; a comma-separated list of ordinals) get MIB (32) each, and so do CHILDREN (0) processes
of their own. The nonce determines the content.

    /gpu                     UUIDs of the visible devices, of each process; how many words are wrong
    /gpu/begin               one more child with memory of its own
    /gpu/busy?ms=N           work on the device that takes so long
    /gpu/peers, /gpu/managed peer access; managed memory
    /gpu/share               the last child maps memory of the first process
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import subprocess
import sys
import zlib
from typing import TYPE_CHECKING, Any, Final

from .probe import Probe

if TYPE_CHECKING:
    from .serving import Ask, Json

BLOCK: Final = 1 << 20
_IPC_BYTES: Final = 64


class CudaError(Exception):
    """A call of the driver failed. The message has call and CUresult."""


class Ipc(ctypes.Structure):
    """CUipcMemHandle."""


Ipc._fields_ = [("reserved", ctypes.c_char * _IPC_BYTES)]


class Gpu:
    """One process's contexts and memory."""

    def __init__(self, seed: str) -> None:
        self._lib = ctypes.CDLL("libcuda.so.1")
        self._seed = seed
        self._call("cuInit", 0)
        count = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        self.count = count.value
        self._contexts: list[ctypes.c_void_p] = []
        self._blocks: list[tuple[int, int]] = []

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._lib, name)(*arguments):
            raise CudaError(f"{name}: {code}")

    def fill(self, device: int, mib: int) -> None:
        """Take memory on a device and write to it."""
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        self._contexts.append(context)
        at = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(at), ctypes.c_size_t(mib * BLOCK))
        for number in range(mib):
            address = ctypes.c_uint64(at.value + number * BLOCK)
            self._call("cuMemsetD32_v2", address, self._word(number), ctypes.c_size_t(BLOCK // 4))
            self._blocks.append((address.value, self._word(number)))

    def _word(self, number: int) -> int:
        return zlib.crc32(f"{self._seed} {number}".encode())

    def wrong(self) -> int:
        """How many blocks are not what they were."""
        self._call("cuCtxSynchronize")
        found, got = 0, ctypes.create_string_buffer(BLOCK)
        for address, word in self._blocks:
            self._call("cuMemcpyDtoH_v2", got, ctypes.c_uint64(address), ctypes.c_size_t(BLOCK))
            found += got.raw != struct.pack("=I", word) * (BLOCK // 4)
        return found

    def uuids(self) -> list[str]:
        """Of the visible devices, in hexadecimal."""
        found = []
        for device in range(self.count):
            uuid = (ctypes.c_ubyte * 16)()
            self._call("cuDeviceGetUuid_v2", ctypes.byref(uuid), device)
            found.append(bytes(uuid).hex())
        return found

    def busy(self, ms: int) -> None:
        """Have the device work. The stand-in has a call for it."""
        self._call("cuStandinBusy", ms)

    def peers(self) -> None:
        """Let the devices see each other's memory."""
        self._call("cuCtxEnablePeerAccess", self._contexts[-1], 0)

    def managed(self) -> None:
        """Take managed memory."""
        self._call("cuMemAllocManaged", ctypes.byref(ctypes.c_uint64()), ctypes.c_size_t(BLOCK), 1)

    def exported(self) -> str:
        """A handle of the first memory for another process."""
        handle = Ipc()
        address = ctypes.c_uint64(self._blocks[0][0])
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), address)
        return bytes(handle).hex()

    def imported(self, handle: str) -> None:
        """Map it here."""
        given = Ipc.from_buffer_copy(bytes.fromhex(handle))
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(ctypes.c_uint64()), given, 1)

    def describe(self) -> dict[str, Any]:
        """For an answer."""
        return {"pid": os.getpid(), "uuids": self.uuids(), "wrong": self.wrong(),
                "blocks": len(self._blocks)}  # fmt: skip


class Child:
    """A process with memory of its own, asked over pipes."""

    def __init__(self, seed: str, device: int, mib: int) -> None:
        argv = [sys.executable, "-m", "workers.gpu", "child", seed, str(device), str(mib)]
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, *words: str) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(" ".join(words) + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found


class GpuProbe(Probe):
    """The probe with endpoints for GPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.mib = int(os.environ.get("MIB", "32"))
        seed = str(self.me.describe()["nonce"])
        self.seed, self.children = seed, list[Child]()
        self.gpu = Gpu(seed)
        for device in os.environ.get("DEVICES", "0").split(","):
            self.gpu.fill(int(device), self.mib)
        for _ in range(int(os.environ.get("CHILDREN", "0"))):
            self.begin_child()

    def begin_child(self) -> None:
        """One more."""
        device = (len(self.children) + 1) % self.gpu.count
        self.children.append(Child(f"{self.seed} {len(self.children)}", device, self.mib))
        self.children[-1].ask("describe")

    def describe(self, _: Ask) -> Json:
        """Of every process."""
        found = [self.gpu.describe(), *(child.ask("describe") for child in self.children)]
        return {"processes": found, "wrong": sum(each["wrong"] for each in found)}

    def begin(self, _: Ask) -> Json:
        self.begin_child()
        return self.children[-1].ask("describe")

    def busy(self, ask: Ask) -> Json:
        self.gpu.busy(ask.whole("ms"))
        return {"ok": True}

    def peers(self, _: Ask) -> Json:
        self.gpu.peers()
        return {"ok": True}

    def managed(self, _: Ask) -> Json:
        self.gpu.managed()
        return {"ok": True}

    def share(self, _: Ask) -> Json:
        return self.children[-1].ask("import", self.gpu.exported())

    def routes(self) -> Any:
        """The probe's, and those of the GPUs."""
        more = {
            "/gpu": self.describe, "/gpu/begin": self.begin, "/gpu/busy": self.busy,
            "/gpu/peers": self.peers, "/gpu/managed": self.managed, "/gpu/share": self.share,
        }  # fmt: skip
        return {**super().routes(), **more}


def child(seed: str, device: str, mib: str) -> None:
    """Answer on standard output what is asked on standard input."""
    gpu = Gpu(seed)
    gpu.fill(int(device) % gpu.count, int(mib))
    for line in sys.stdin:
        do, *rest = line.split()
        if do == "import":
            gpu.imported(rest[0])
        print(json.dumps(gpu.describe()), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:])
    else:
        GpuProbe().run()
