"""Build the stand-in libraries with the machine's C compiler; they lie under build/gpu/standin."""

import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Final

from tests.node import base

HERE: Final = Path(__file__).parent
BUILD: Final = HERE.parents[2] / "build" / "gpu"
LIBRARIES: Final = {"libcuda.so.1": "cuda.c", "libnvidia-ml.so.1": "nvml.c"}
_FLAGS: Final = ("-std=gnu11", "-O2", "-g", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror",
                 "-fvisibility=hidden", "-pthread", "-Wl,-z,now")  # fmt: skip


def build() -> Path:
    """The directory with LIBRARIES; made when not there yet. Raises CalledProcessError."""
    sources = sorted([*HERE.glob("*.c"), *HERE.glob("*.h"), HERE / "build.py"])
    key = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    made = BUILD / f"standin-{key}"
    with base.locked(BUILD / "standin.lock"):
        if not made.is_dir():
            for older in BUILD.glob("*standin-*"):
                shutil.rmtree(older)
            scratch = BUILD / f".{made.name}"
            scratch.mkdir(parents=True)
            for library, source in LIBRARIES.items():
                argv = ["gcc", *_FLAGS, f"-Wl,-soname,{library}", "-o", str(scratch / library)]
                subprocess.run([*argv, str(HERE / source), "-ldl"], check=True)
            scratch.rename(made)
    return made


if __name__ == "__main__":
    print(build())
