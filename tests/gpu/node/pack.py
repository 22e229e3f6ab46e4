"""Program: packs a node for a bare Ubuntu 24.04 machine.

    python3 -m tests.gpu.node.pack FILE.tar.xz

containerd, runc, CRIU and the CNI plugins of Debian with their libraries, the installed deb without
the wheels of other Pythons, the pause image. To be unpacked to / there. The driver, PyTorch and
transformers are the machine's own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.gpu import bundle
from tests.node import base
from tests.node.images import pause_image

SUITE: Final = "forky"
AT: Final = "var/lib/quickthaw-bundle"
"""The directory for the measurement's own files. `bin` has scripts that start the programs."""
STATIC: Final = (
    "usr/bin/containerd", "usr/bin/containerd-shim-runc-v2", "usr/bin/ctr",
    "usr/lib/cni/bridge", "usr/lib/cni/host-local", "usr/lib/cni/loopback",
)  # fmt: skip
"""Programs that need nothing but a C library, and what their version of it is everywhere."""
PROGRAMS: Final = {"criu": "usr/sbin/criu", "runc": "usr/sbin/runc"}
TAG: Final = os.environ.get("PYTHON_TAG", "cp312")
MOST_BYTES: Final = 58 << 20


def main() -> int:
    """1 when the file is larger than it may be."""
    target = Path(sys.argv[1]).absolute()
    root = base.node_root(SUITE)
    with tempfile.TemporaryDirectory() as made:
        tree = Path(made)
        for name in STATIC:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, tree / name)
        _programs(root, tree)
        _product(tree)
        shutil.copy2(pause_image(), tree / AT / "pause.tar")
        target.parent.mkdir(parents=True, exist_ok=True)
        command = ["tar", "--numeric-owner", "--owner=0", "--group=0", "-C", made, "-cf", "-", "."]
        packer = ["xz", "-6", "-T0", "-c"] if target.suffix == ".xz" else ["cat"]
        with target.open("wb") as file, subprocess.Popen(command, stdout=subprocess.PIPE) as tar:
            subprocess.run(packer, stdin=tar.stdout, stdout=file, check=True)
    size = target.stat().st_size
    print(f"{target}: {size / (1 << 20):.1f} MiB")
    return int(target.suffix == ".xz" and size > MOST_BYTES)


def _programs(root: Path, tree: Path) -> None:
    """CRIU and runc, with scripts in their places that give them Debian's libraries."""
    home = tree / AT
    for name in ("bin", "libexec", "lib", "libc"):
        (home / name).mkdir(parents=True)
    for name, path in PROGRAMS.items():
        bundle.collect(root, root / path, home)
        place = tree / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(f"/{AT}/bin/{name}")


def _product(tree: Path) -> None:
    (deb,) = (base.BUILD.parent / "packages").glob("*.deb")
    subprocess.run(["dpkg-deb", "--extract", str(deb), str(tree)], check=True)
    with tempfile.TemporaryDirectory() as control:
        subprocess.run(["dpkg-deb", "--control", str(deb), control], check=True)
        shutil.copy2(Path(control) / "postinst", tree / AT / "postinst")
    for wheels in (tree / "usr/lib/quickthaw/vendor").glob("cp*"):
        if wheels.name != TAG:
            shutil.rmtree(wheels)
    shutil.rmtree(tree / "usr/share/doc", ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
