"""Program: what a real GPU's driver does to a checkpointed process, question by question.

    python3 -m tests.gpu.probe --bundle DIR --out DIR [--parts 2,3,4,5] [--limit SECONDS] [--fake]

Runs on a bare Ubuntu 24.04 with an NVIDIA driver >= 570, Python with PyTorch, and what `make
gpu-bundle` made. Parts are the questions of docs/gpu-facts.md; each has its own time limit and its
own process, and writes OUT/facts.json after every finding. All of it fits into nine minutes; the
steps of `scene.LONG` are done when --only names them. Nothing of the GPU's settings is touched; of
the kernel's, transparent huge pages for the steps that say so, and put back. With --fake no GPU is
needed: a stand-in plays the driver.
"""

import argparse
import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Final

from shim.kernel import procfs
from tests.gpu import children, record
from tests.gpu.scene import Scene

PR_SET_CHILD_SUBREAPER: Final = 36
PARTS: Final = {
    "2": ("part_states", 240),
    "3": ("part_staging", 200),
    "4": ("part_images", 190),
    "5": ("part_elsewhere", 100),
    "1": ("part_machine", 120),
    "8": ("part_failures", 120),
    "6": ("part_libraries", 190),
    "7": ("part_pairs", 40),
}
"""Module and limit in seconds; the order is that of their worth."""


def main() -> int:
    """0 when every part ended by itself."""
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    facts = options.out / "facts.json"
    if options.one:
        scene = Scene(record.Record(facts, f"part {options.one}"), options.bundle, options.scratch,
                      options.fake)  # fmt: skip
        import_module(f"tests.gpu.{PARTS[options.one][0]}").run(scene, options.only)
        return 0
    return every(options, facts)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=lambda text: Path(text).resolve(), required=True)
    parser.add_argument("--out", type=lambda text: Path(text).resolve(), required=True)
    parser.add_argument("--parts", default=",".join(PARTS))
    only = "steps by their names in the output, with ; between them"
    parser.add_argument("--only", type=lambda text: tuple(text.split(";")), default=(), help=only)
    parser.add_argument("--limit", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--fake", action="store_true", help="without a GPU")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def every(options: argparse.Namespace, facts: Path) -> int:
    """All parts, one after the other, each in a process of its own."""
    # What a part leaves becomes our child, so that it can be found, killed and reaped.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    until, late = time.monotonic() + options.limit, 0
    place = Path(tempfile.mkdtemp(prefix="gpu-probe-"))
    try:
        for number in options.parts.split(","):
            left = min(PARTS[number][1], until - time.monotonic())
            if left < 5:
                record.Record(facts, f"part {number}").put("not run", "no time was left")
                late += 1
                continue
            late += not part(options, number, place, left, facts)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        table = record.table(facts)
        (options.out / "facts.txt").write_text(table + "\n")
    return 1 if late else 0


def part(
    options: argparse.Namespace, number: str, place: Path, limit_s: float, facts: Path
) -> bool:
    """Whether it ended by itself and well."""
    scratch = place / number
    scratch.mkdir()
    words = ["--one", number, "--scratch", str(scratch), "--bundle", str(options.bundle)]
    words += ["--out", str(options.out), *(["--fake"] if options.fake else [])]
    words += ["--only", ";".join(options.only)] if options.only else []
    started = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.gpu.probe", *words],
        env=children.environment(),
        cwd=children.ROOT,
    )
    code = wait(child.pid, started + limit_s)
    end_all(child.pid)
    took = round(time.monotonic() - started, 1)
    record.Record(facts, f"part {number}").put("ended", {"rc": code, "s": took, "limit_s": limit_s})
    shutil.rmtree(scratch, ignore_errors=True)
    return code == 0


def wait(pid: int, until: float) -> int | None:
    """Exit status of `pid`, None when it ran too long. Reaps whatever else ends meanwhile."""
    while time.monotonic() < until:
        ended, status = reap()
        if ended == pid:
            return os.waitstatus_to_exitcode(status)
        if not ended:
            time.sleep(0.005)
    return None


def reap() -> tuple[int, int]:
    """(0, 0) when no child has ended."""
    try:
        return os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return 0, 0


def end_all(first: int) -> None:
    """Kill what a part left, itself included, and wait a while until it is gone."""
    until = time.monotonic() + 10
    while (left := descendants()) and time.monotonic() < until:
        for pid in {first, *left} & left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while reap()[0]:
            pass
        time.sleep(0.02)


def descendants() -> set[int]:
    """Of this process, from /proc."""
    parents = {}
    for pid in procfs.pids():
        with contextlib.suppress(OSError):
            parents[pid] = procfs.parent(pid)
    found: set[int] = set()
    newest = {os.getpid()}
    while newest:
        newest = {pid for pid, parent in parents.items() if parent in newest} - found
        found |= newest
    return found


if __name__ == "__main__":
    sys.exit(main())
