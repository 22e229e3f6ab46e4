"""How fast the mover is: `python3 -m tests.gpu.direct.rates DIRECTORY GIB THREADS…`. JSON lines."""

import json
import os
import sys
import time
from pathlib import Path

from shim.gpu.direct import mover
from shim.gpu.direct.device import Driver, Gpu
from shim.gpu.direct.mover import Move, Ring


def main() -> None:
    """Each number of threads twice; the first saving makes the files."""
    files, gib = Path(sys.argv[1]), int(sys.argv[2])
    gpu = Gpu(Driver(), bytes.fromhex(uuid_of_first()))
    gpu.use()
    memory = [gpu.created(1 << 30) for _ in range(gib)]
    chunks = mover.layout([1 << 30] * gib)
    fds = [
        os.open(files / mover.name(0, n), os.O_RDWR | os.O_CREAT, 0o600) for n in range(mover.FILES)
    ]
    for threads in [int(word) for word in sys.argv[3:]] * 2:
        began = time.perf_counter()
        ring = Ring(gpu, threads)
        pinned = time.perf_counter() - began
        found: dict[str, float] = {"threads": threads, "pin_s": round(pinned, 3)}
        for name, work in (("save", Move.save), ("load", Move.load)):
            began, used = time.perf_counter(), time.process_time()
            work(Move(ring, memory, fds), chunks)
            took = time.perf_counter() - began
            found[f"{name}_GBps"] = round((gib << 30) / took / 1e9, 2)
            found[f"{name}_processors"] = round((time.process_time() - used) / took, 2)
        print(json.dumps(found), flush=True)


def uuid_of_first() -> str:
    """Of the machine's first GPU."""
    import ctypes

    uuid = (ctypes.c_ubyte * 16)()
    Driver().do("cuDeviceGetUuid_v2", uuid, 0)
    return bytes(uuid).hex()


if __name__ == "__main__":
    main()
