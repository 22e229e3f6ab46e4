"""Program: measures captures and restores of GPU containers on a node; writes OUT/gpu.json, gpu.md.

    python3 -m tests.gpu.node --out OUT [--standin SUITE] [--seconds 560] [--gib 30] [--only PARTS]

--standin: a node enclosure with the stand-in for the driver, everything much smaller: the
rehearsal. Without, this machine becomes the node, on which the bundle of `tests.gpu.node.pack` has
been unpacked; `--standin here` is the same with the stand-in: `tests.gpu.node.rehearsal`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.gpu.node.harm import Harm
from tests.gpu.node.measure import Run
from tests.gpu.node.work import Probe, Torch
from tests.node import base
from tests.node.gpus import gpus
from tests.node.node import Node
from tests.workers import images

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.gpu.node.work import Work

HOME: Final = Path("/var/tmp/quickthaw-measured")
BUNDLE: Final = Path("/var/lib/quickthaw-bundle")
HERE: Final = "here"
GROWERS, GROWS_WITHIN_S = 12, 90.0
STORE: Final = "/var/lib/quickthaw"
PYTHON: Final = "/opt/torch/.venv/bin/python3"


def main() -> int:
    """1 when a part failed or was wrong."""
    parser = argparse.ArgumentParser(prog="tests.gpu.node")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--standin", default="")
    parser.add_argument("--seconds", type=float, default=560.0)
    parser.add_argument("--gib", type=float, default=30.0)
    parser.add_argument("--restores", type=int, default=8)
    parser.add_argument("--only", default="direct,driver,cold,faults")
    parser.add_argument("--python", default=PYTHON)
    parser.add_argument("--image", type=Path, help="of the probe, for --standin")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + options.seconds
    if options.standin:
        work: Work = Probe(options.image or images.build("probe"))
    else:
        work = Torch(options.python)
    with _node(options.standin) as node:
        run = Run(node, work, options.out, until)
        run.document["machine"] = {
            "kernel": platform.release(), "processors": os.cpu_count(),
            "standin": options.standin, "gib": options.gib,
        }  # fmt: skip
        parts = {
            "direct": (100, lambda: run.way("direct", options.gib, options.restores, again=True)),
            "cold": (70, lambda: run.cold(options.gib, 3)),
            "faults": (60, lambda: Harm(run).all()),
            "driver": (110, lambda: run.way("driver", options.gib, 3, again=False)),
        }
        try:
            work.prepare(node)
            for name in options.only.split(","):
                needs_s, do = parts[name]
                run.part(name, 0 if options.standin else needs_s, do)
        finally:
            (options.out / "quickthawd.log").write_text(node.journal()[-1_000_000:])
    print((options.out / "gpu.md").read_text())
    faults = run.document.get("faults", [])
    return int(bool(run.document["failed"]) or not all(row["ok"] is not False for row in faults))


@contextlib.contextmanager
def _node(standin: str) -> Iterator[Node]:
    if standin not in ("", HERE):
        (deb,) = (base.BUILD.parent / "packages").glob("*.deb")
        with Node(standin) as node:
            node.start_product(deb)
            with gpus(node, 1):
                yield node
        return
    from tests.gpu.node.machine import Machine

    shutil.rmtree(HOME, ignore_errors=True)
    pause = base.BUILD / "images" / "pause.tar"
    pause.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(BUNDLE / "pause.tar", pause)
    if not standin:
        _grow()
    with Machine(HOME) as node:
        node.run(["mkdir", "-p", STORE])
        node.run(["mount", "-t", "tmpfs", "-o", "size=80g,huge=always,mode=700", "store", STORE])
        node.run([str(BUNDLE / "postinst"), "configure"], timeout_s=200)
        node.containerd.swapping = True
        node.start_containerd()
        node.start_daemon()
        with gpus(node, 1) if standin else contextlib.nullcontext():
            yield node


def _grow() -> None:
    """Use most of the memory once: a virtual machine may get it only then, and slowly."""
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    each = available * 1024 * 3 // 4 // GROWERS
    code = f"import mmap; mmap.mmap(-1, {each}, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).madvise(23)"
    growing = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(GROWERS)]
    for one in growing:
        one.wait(GROWS_WITHIN_S)


if __name__ == "__main__":
    sys.exit(main())
