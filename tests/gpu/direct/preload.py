"""Builds the preloaded library, and a program of the driver's API that has it, for tests."""

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Final

from tests.gpu.standin.build import build as build_standin
from tests.node import base

ROOT: Final = Path(__file__).parents[3]
SOURCE: Final = ROOT / "gpu"


def library(at: Path, control: Path) -> Path:
    """As it is shipped, but that the host's socket is in `control`."""
    places = f'-DQT_SOCKET="\\"{control}/gpu.sock\\"" -DQT_IPC="\\"{control}\\""'
    run(["make", "-s", "-C", str(SOURCE), f"OUT={at}", f"MORE={places}"])
    return at / "libquickthaw-gpu.so"


def shipped() -> Path:
    """The library of the package."""
    out = ROOT / "build" / "gpu"
    with base.locked(out / "preload.lock"):
        run(["make", "-s", "-C", str(SOURCE), f"OUT={out}"])
    return out / "libquickthaw-gpu.so"


def plain(at: Path) -> Path:
    """The program `plain`, linked with the stand-in's libcuda."""
    source, standin = Path(__file__).with_name("plain.c"), build_standin()
    key = hashlib.sha256(source.read_bytes()).hexdigest()[:8]
    made = at / f"plain-{key}"
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
    run(["gcc", *flags, "-o", str(made), str(source), f"-L{standin}", "-l:libcuda.so.1"])
    return made


def run(argv: list[str]) -> str:
    """Run a command; returns its output. Raises CalledProcessError."""
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(argv, check=True, capture_output=True, text=True, env=environment)
    return done.stdout
