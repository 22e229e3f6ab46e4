"""Program: rehearses a measurement on a bare machine, in an enclosure that has nothing of ours.

    python3 -m tests.gpu.node.rehearsal OUT [ARGUMENTS OF tests.gpu.node]

Packs the bundle for the enclosure's Python, unpacks it there, and runs `tests.gpu.node` as on the
real machine, with the stand-in for the driver.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.node.node import Node
from tests.workers import images

ROOT: Final = Path(__file__).parents[3]
SUITE, TAG = "trixie", "cp313"
REPO: Final = "/srv/quickthaw"
VENDOR: Final = "/usr/lib/quickthaw/vendor"
PYTHONPATH: Final = f"{REPO}:{VENDOR}/pure:{VENDOR}/{TAG}"
IMAGE: Final = "/srv/probe.tar"
WITHIN_S: Final = 1200


def main() -> int:
    """Returns the exit status of the measurement."""
    out, more = Path(sys.argv[1]).absolute(), sys.argv[2:]
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, Node(SUITE) as node:
        packed = Path(scratch) / "node.tar"
        subprocess.run(
            [sys.executable, "-m", "tests.gpu.node.pack", str(packed)], cwd=ROOT, check=True,
            env={**os.environ, "PYTHON_TAG": TAG},
        )  # fmt: skip
        with packed.open("rb") as file:
            node.run(["tar", "-C", "/", "--keep-directory-symlink", "-xf", "-"], stdin=file,
                     timeout_s=300)  # fmt: skip
        _copy(node)
        node.run(["mkdir", "-p", "/srv/out"])
        try:
            done = node.call(
                ["/usr/bin/python3", "-m", "tests.gpu.node", "--out", "/srv/out", "--standin",
                 "here", "--image", IMAGE, *more],
                environment={"PYTHONPATH": PYTHONPATH, "PYTHONUNBUFFERED": "1"},
                timeout_s=WITHIN_S,
            )  # fmt: skip
        finally:
            for path in node.path("/srv/out").iterdir():
                (out / path.name).write_bytes(path.read_bytes())
    print(done.stdout[-20000:], done.stderr[-5000:])
    return done.returncode


def _copy(node: Node) -> None:
    """The tree that travels, and what is built of it."""
    node.path(IMAGE).write_bytes(images.build("probe").read_bytes())
    command = ["tar", "-C", str(ROOT), "-cf", "-", "tests", "shim", "protos", "hook", "gpu",
               "build/gpu"]  # fmt: skip
    with tempfile.TemporaryFile() as file:
        subprocess.run(command, stdout=file, check=True)
        file.seek(0)
        node.run(["mkdir", "-p", REPO])
        node.run(["tar", "-C", REPO, "-xf", "-"], stdin=file, timeout_s=300)


if __name__ == "__main__":
    sys.exit(main())
